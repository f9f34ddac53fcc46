"""The mistakes a user can make, as one tree of exceptions.

DreamboothError                 every error below; printed as one line, never as a traceback
├── ParamsError                 params.yaml: unknown key, wrong type, value out of range (all faults at once)
├── SubjectError                a subject that is not in params.yaml, an id that is no id, a missing folder
│   ├── PhotosError             photos that cannot be used (all of them at once)
│   └── ConsentError            a person without a consent, or with one that does not hold today
├── ModelError                  a base or trained model that is missing, torn, or of the wrong kind
├── TornFolderError             a folder whose files are not what its manifest says (folders.py)
├── DiskFullError               not enough space for what is about to begin (folders.py)
├── HomelessError               a user without a home, and no folder named for what lies there (folders.py)
├── AlreadyRunningError         another process does this work (locks.py)
├── Interrupted                 told to stop, state saved (interruption.py)
├── PriorError                  class images that cannot be drawn
├── TrainingError               a training that cannot start or go on
│   ├── DivergedError           its loss is not finite any more
│   └── OutOfMemoryError        its step does not fit into the memory
├── EvaluationError             an evaluation without the prompts or the numbers it needs
│   └── UnknownWordError        a prompt with words that the image-text scorer never saw (all of them at once)
├── ExportError                 a format that the training of a model does not fill
├── TrackerError                a tracker that is not installed or does not start
├── RegistryError               an export that cannot be registered, or a version that cannot be loaded
│   └── GateError               a version that may not become the champion
└── PipelineError               a stage that failed, a checkout that is no project, DVC that is busy

Each message says what is wrong, the value, where it is, and what to do next. `code` is stable for scripts,
`exit_code` is what the command and the stages exit with.
"""

import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

MACHINE_FAULT = 71  # EX_OSERR of sysexits.h


class DreamboothError(Exception):
    """A mistake that its user can mend; the message says how."""

    code = "E_DREAMBOOTH"
    exit_code = 1


class ParamsError(DreamboothError):
    """Refuse params.yaml, with every fault in it.

    Args:
        problems: one line for each fault, each with the full path of its field.
    """

    code = "E_PARAMS"
    exit_code = 2

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class SubjectError(DreamboothError):
    """Refuse a subject: its id, its entry in params.yaml, or its folder."""

    code = "E_SUBJECT"
    exit_code = 3


class PhotosError(SubjectError):
    """Refuse the photos of a subject, with every file that cannot be used.

    Args:
        problems: one line for each fault, each with the file.
    """

    code = "E_PHOTOS"
    exit_code = 3

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class ConsentError(SubjectError):
    """Refuse to work with the photos of a person."""

    code = "E_CONSENT"
    exit_code = 3


class ModelError(DreamboothError):
    """Refuse a model folder or hub id."""

    code = "E_MODEL"
    exit_code = 4


class PriorError(DreamboothError):
    """Give up drawing class images."""

    code = "E_PRIOR"
    exit_code = 5


class TrainingError(DreamboothError):
    """Stop a training."""

    code = "E_TRAIN"
    exit_code = 6


class DivergedError(TrainingError):
    """Stop a training whose loss, gradient or weights are not finite any more."""

    code = "E_DIVERGED"
    exit_code = 6


class OutOfMemoryError(TrainingError):
    """Stop a training whose step does not fit into the memory of the device."""

    code = "E_OUT_OF_MEMORY"
    exit_code = MACHINE_FAULT


class EvaluationError(DreamboothError):
    """Refuse to print a score that would mean nothing."""

    code = "E_EVALUATE"
    exit_code = 7


class UnknownWordError(EvaluationError):
    """Refuse to score a prompt whose words the image-text scorer never saw.

    Args:
        prompt: the whole prompt.
        words: the unknown ones, in their order.
    """

    code = "E_UNKNOWN_WORD"

    def __init__(self, prompt: str, words: Sequence[str]) -> None:
        super().__init__(
            f"the image-text scorer does not know {', '.join(map(repr, words))} in {prompt!r}; use the words of its "
            "vocabulary.json, or another scorer"
        )


class ExportError(DreamboothError):
    """Refuse an export that a training has nothing for."""

    code = "E_EXPORT"
    exit_code = 12


class TrackerError(DreamboothError):
    """Refuse a tracker that is not installed, or does not start."""

    code = "E_TRACKER"
    exit_code = 13


class RegistryError(DreamboothError):
    """Refuse to register or to load a version."""

    code = "E_REGISTRY"
    exit_code = 8


class GateError(RegistryError):
    """Refuse to promote a version."""

    code = "E_GATE"
    exit_code = 10


class PipelineError(DreamboothError):
    """Report a stage that failed, or a folder that is no project."""

    code = "E_PIPELINE"
    exit_code = 9


def wants_traceback() -> bool:
    """Whether the user asks for the traceback of an error as well: `dreambooth --debug`, DREAMBOOTH_DEBUG=1."""
    return bool(os.environ.get("DREAMBOOTH_DEBUG"))


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, its kind where it says nothing, as a MemoryError does."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def shown(text: object) -> str:
    """Return a name or a path that strangers chose as one printable line: no line breaks, no escape sequences."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(text))


_NO_MEMORY = (  # plain RuntimeErrors
    "can't allocate memory",  # c10/core/impl/alloc_cpu.cpp
    "CUDA error: out of memory",  # outside of torch's own allocator
    "STATUS_ALLOC_FAILED",  # cuBLAS and cuDNN, for their workspaces
    "unable to find an engine to execute this computation",  # cuDNN, when no engine's workspace fits
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of the device, or of the machine, ran out; by name, for torch is not imported here."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or any(words in str(error) for words in _NO_MEMORY)


def machine_fault(error: BaseException) -> str:
    """Explain what the machine or a path lacks in one line; empty for a fault of ours, whose traceback is wanted."""
    if isinstance(error, OSError):
        return _file_fault(error)
    if is_out_of_memory(error):
        return (
            f"E_OUT_OF_MEMORY: {first_line(error)}; lower batch_size of the stage, or set "
            "train.gradient_checkpointing: true"
        )
    return ""


def _file_fault(error: OSError) -> str:
    name = shown(error.filename or "")
    if error.errno == errno.ENOSPC:
        free = shutil.disk_usage(_nearest_folder(error.filename)).free
        return f"E_DISK_FULL: {name or 'the disk'}: no space left ({free} bytes free); make room, run again"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"E_PERMISSION: {name}: {error.strerror}; make it readable and writable for this user"
    if name and error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        return f"E_FILE: {name[:100]}: {error.strerror}; give another path"
    if name and error.errno in (errno.ENOTDIR, errno.EISDIR, errno.EEXIST):
        return f"E_FILE: {name}: {error.strerror}; something else should stand there, move it away"
    return ""


def _nearest_folder(name: object) -> Path:
    """Return the folder of a file that may be gone by now."""
    here = Path(str(name or ".")).absolute()
    return next(folder for folder in (here, *here.parents) if folder.exists())
