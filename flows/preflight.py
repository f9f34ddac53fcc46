"""Report what params.yaml asks for in vain up front: the stage that would refuse it runs after the training."""

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from dreambooth.bases import LOCAL_MODELS, locate, read_json
from dreambooth.errors import ParamsError, PhotosError, shown
from dreambooth.identifiers import known_words, reader_at, remarks_by_tokenizer
from dreambooth.params import Base, Params, scheduler_fault
from dreambooth.prompts import Reader, Template, cuts, read_caption, require_read, templates_of, with_article
from dreambooth.registry import require_plain_path
from dreambooth.vocabulary import SCORER, VOCABULARY, Vocabulary, find_vocabulary
from flows.graph import DATA_SUFFIX, GPU_ENTRIES, Graph
from flows.project import PARAMS

VALIDATE, PRIOR, TRAIN, EVALUATE = "validate", "prior", "train", "evaluate"
BUNDLED = f"{LOCAL_MODELS}/emoji64"  # the base that the bundled scorer was taught beside
ALIKE = 0.75  # of two words, by difflib: candel is candle, and a van is no can
RIFLE = "sks"  # the identifier of the paper's reference implementations; no caption of the bundled base has it


def require_inputs(root: Path, params: Params, graph: Graph) -> list[str]:
    """Refuse what a stale stage or the registration would: photos or a base that are nowhere, solvers, prompts, a path.

    Returns:
        What is to be said of prompts whose end the base does not read.

    Raises:
        SubjectError, ModelError, EvaluationError, PhotosError, ParamsError, RegistryError: as they would.
    """
    require_plain_path(root)
    require_photos(root, [stage.key for stage in graph.stale if stage.entry == VALIDATE])
    if any(stage.entry in GPU_ENTRIES for stage in graph.stale):
        locate(params.base.pretrained_model_name_or_path, params.base.revision, root)
    _require_schedulers(root, params, graph)
    files = dict.fromkeys(map(params.prompts_file, _stale(graph, EVALUATE)))
    templates = {file: templates_of(root, file) for file in files}
    reader = reader_at(tokenizer_folder(root, params.base)) if graph.stale else None
    return list(dict.fromkeys(_read_in_part(root, params, graph, templates, reader))) if reader else []


def require_photos(root: Path, subjects: Iterable[str]) -> None:
    """Refuse subjects without a folder of photos: in a fresh clone of git there are those alone that git has.

    Raises:
        PhotosError: DVC knows folders that are not here; with the commands that bring them.
        SubjectError: nobody knows one.
    """
    if not (subjects := list(subjects)):
        return
    from dreambooth.photos import find_photos, subject_folder  # SciPy takes a second, and may not be needed

    missing = [folder for one in subjects if not (folder := subject_folder(root, one)).is_dir()]
    if told := [known for folder in missing if (known := elsewhere(root, folder))]:
        raise PhotosError(told)
    for folder in missing:
        find_photos(folder)


def elsewhere(root: Path, folder: Path) -> str:
    """Say how photos come here that DVC knows and that are not here; empty where it knows none."""
    if not (entry := folder.with_name(f"{folder.name}{DATA_SUFFIX}")).is_file():
        return ""
    name = entry.relative_to(root)
    return f"{folder} is not here, {name} knows it; dvc checkout {name}, or where a remote has it: dvc pull {name}"


def remarks(root: Path, params: Params, graph: Graph) -> list[str]:
    """Say what will be worse than its user may think, of the subjects whose evaluation is stale."""
    subjects = _stale(graph, EVALUATE)
    if not subjects:
        return []
    identifiers = dict.fromkeys(params.subject(one).identifier for one in subjects)
    nouns = dict.fromkeys(params.class_of(one).class_noun for one in subjects)
    return [
        *poor_identifiers(root, params, identifiers, nouns),
        *unknown_nouns(root, params, nouns),
        *foreign_scorer(root, params),
    ]


def poor_identifiers(
    root: Path, params: Params, identifiers: Iterable[str], class_nouns: Iterable[str]
) -> Iterator[str]:
    """Say which identifiers mean something already, as far as the tokenizer of the base is at hand."""
    if params.train.learns_token:  # the identifier becomes a token of its own
        return
    identifiers, words = list(identifiers), known_words(root, class_nouns)
    yield from remarks_by_tokenizer(identifiers, tokenizer_folder(root, params.base), words)
    if RIFLE in identifiers and not _is_bundled(root, params.base):
        yield (
            f"identifier {RIFLE!r} is a rifle to Stable Diffusion, which may be in the pictures; rarer words: "
            "docs/recipes.md"
        )


def unknown_nouns(root: Path, params: Params, class_nouns: Iterable[str]) -> Iterator[str]:
    """Say which words of classes the bundled scorer never saw: nothing of such a class can be promoted by it."""
    vocabulary = find_vocabulary(root)
    if params.evaluate.encoders != "bundled" or vocabulary is None:
        return
    for class_noun in class_nouns:
        if unknown := vocabulary.parse(class_noun)[1]:
            yield (
                f"the bundled scorer does not know {', '.join(map(repr, unknown))} of the class {class_noun!r}: prompt "
                f"fidelity cannot be measured, and nothing is promoted; {_meant(vocabulary, class_noun)}"
            )


def _meant(vocabulary: Vocabulary, class_noun: str) -> str:
    """Ask for the words that a class noun may be a slip of; name the place of all words where there are none."""
    known = [" ".join(phrase) for phrase, token in vocabulary.phrases.items() if token is not None]
    near = difflib.get_close_matches(class_noun.lower(), known, n=1, cutoff=ALIKE)
    if near:
        return f"did you mean {near[0]!r}? then change the class_noun in {PARAMS}"
    return f"its words stand in {SCORER}/{VOCABULARY}"


def foreign_scorer(root: Path, params: Params) -> Iterator[str]:
    """Say that the bundled scorer would judge pictures of a kind that it never saw."""
    if params.evaluate.encoders == "bundled" and not _is_bundled(root, params.base):
        yield (
            f"evaluate.encoders: bundled measures prompt fidelity by {SCORER}, which knows drawings of 64 pixels, and "
            f"the base is {params.base.pretrained_model_name_or_path}; for photos: evaluate.encoders: hub (DINO, CLIP) "
            "and evaluate.prompts: data/prompts/photo"
        )


def cut_captions(
    params: Params, captions: Iterable[Path], identifier: str, class_noun: str, reader: Reader
) -> list[str]:
    """Refuse captions of which the base would read no subject; return what is to be said of those it reads in part.

    Raises:
        PhotosError: with each of them; or with the first file that is no caption.
    """
    templates = [(shown(path), read_caption(path)) for path in captions]
    return require_read(cuts(templates, _called(params, identifier, class_noun), reader), PhotosError)


def _read_in_part(
    root: Path, params: Params, graph: Graph, templates: Mapping[str, Sequence[Template]], reader: Reader
) -> Iterator[str]:
    """Go through captions, class prompts and evaluation prompts, as far as their stages are stale."""
    for subject_id in _stale(graph, TRAIN):
        from dreambooth.photos import find_photos, subject_folder

        subject, class_noun = params.subject(subject_id), params.class_of(subject_id).class_noun
        if (folder := subject_folder(root, subject_id)).is_dir():
            captions = find_photos(folder).captions.values()
            yield from cut_captions(params, captions, subject.identifier, class_noun, reader)
    for class_id in _stale(graph, PRIOR) if params.prior.kind == "images" else ():
        noun = with_article(params.classes[class_id].class_noun)
        yield from require_read(cuts(params.prior.named_prompts, noun, reader), ParamsError)
    for subject_id in _stale(graph, EVALUATE):
        file = params.prompts_file(subject_id)
        words = _called(params, params.subject(subject_id).identifier, params.class_of(subject_id).class_noun)
        yield from (cut.text for cut in cuts([(file, one.prompt) for one in templates[file]], words, reader))


def _called(params: Params, identifier: str, class_noun: str) -> str:
    """Return the words for a subject; a word that is learned is one token, as any letter is."""
    return f"{'x' if params.train.learns_token else identifier} {class_noun}"


def tokenizer_folder(root: Path, base: Base) -> Path | None:
    """Return where the tokenizer of a base lies: in its folder, or in the cache of the hub, which is not asked."""
    for name in ("tokenizer.json", "vocab.json"):
        if (found := _at_hand(root, base, f"tokenizer/{name}")) is not None:
            return found.parent
    return None


def _at_hand(root: Path, base: Base, name: str) -> Path | None:
    """Return where a file of a base lies: in its folder, or in the cache of the hub, which is not asked."""
    if (folder := root / base.pretrained_model_name_or_path).is_dir():
        return folder / name if (folder / name).is_file() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(base.pretrained_model_name_or_path, name, revision=base.revision)
    except HFValidationError:  # neither a folder nor a hub id, which `locate` refuses
        return None
    return Path(found) if isinstance(found, str) else None


def _require_schedulers(root: Path, params: Params, graph: Graph) -> None:
    """Refuse solvers that cannot draw with the base, as far as its scheduler_config.json is at hand."""
    about = _at_hand(root, params.base, "scheduler/scheduler_config.json")
    if about is None:
        return
    stale = {stage.entry for stage in graph.stale}
    asked = {"prior": params.prior.scheduler} if PRIOR in stale and params.prior.kind == "images" else {}
    asked |= {"evaluate": params.evaluate.scheduler} if EVALUATE in stale else {}
    known = read_json(about)
    faults = {section: scheduler_fault(name, known) for section, name in asked.items()}
    if told := [f"params.yaml: {section}.{fault}" for section, fault in faults.items() if fault]:
        raise ParamsError(told)


def _is_bundled(root: Path, base: Base) -> bool:
    return root / base.pretrained_model_name_or_path == root / BUNDLED


def _stale(graph: Graph, entry: str) -> list[str]:
    return [stage.key for stage in graph.stale if stage.entry == entry]
