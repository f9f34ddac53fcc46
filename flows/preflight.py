"""What params.yaml asks for in vain, told before the first stage: the one that refuses it comes after the training."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from dreambooth.bases import LOCAL_MODELS, locate
from dreambooth.errors import DreamboothError, PhotosError
from dreambooth.identifiers import COMMON, remarks_by_tokenizer
from dreambooth.params import Base, Params
from dreambooth.photos import find_photos, subject_folder
from dreambooth.prompts import load_templates
from dreambooth.vocabulary import SCORER, VOCABULARY, Vocabulary, read_file, read_vocabulary, split
from flows.graph import DATA_SUFFIX, GPU_ENTRIES, Graph

VALIDATE, EVALUATE = "validate", "evaluate"
BUNDLED = f"{LOCAL_MODELS}/emoji64"  # the base that the bundled scorer was taught beside
RIFLE = "sks"  # the identifier of the paper's reference implementations; no caption of the bundled base has it


def require_inputs(root: Path, params: Params, graph: Graph) -> None:
    """Refuse what a stale stage would refuse: photos, or a base model, that are nowhere, prompts that cannot be read.

    Raises:
        SubjectError, ModelError, EvaluationError: as the stage would.
    """
    require_photos(root, [stage.key for stage in graph.stale if stage.entry == VALIDATE])
    if any(stage.entry in GPU_ENTRIES for stage in graph.stale):
        locate(params.base.pretrained_model_name_or_path, params.base.revision, root)
    for file in dict.fromkeys(map(params.prompts_file, _evaluated(graph))):
        load_templates(root / file)


def require_photos(root: Path, subjects: Iterable[str]) -> None:
    """Refuse subjects without a folder of photos: in a fresh clone of git there are those alone that git has.

    Raises:
        PhotosError: DVC knows folders that are not here; with the commands that bring them.
        SubjectError: nobody knows one.
    """
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
    subjects = _evaluated(graph)
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
    identifiers, vocabulary = list(identifiers), _vocabulary(root)
    words = COMMON.union(*map(split, class_nouns), *(vocabulary.phrases if vocabulary else ()))
    yield from remarks_by_tokenizer(identifiers, tokenizer_folder(root, params.base), words)
    if RIFLE in identifiers and not _is_bundled(root, params.base):
        yield (
            f"identifier {RIFLE!r} is a rifle to Stable Diffusion, which may be in the pictures; rarer words: "
            "docs/recipes.md"
        )


def unknown_nouns(root: Path, params: Params, class_nouns: Iterable[str]) -> Iterator[str]:
    """Say which words of classes the bundled scorer never saw: nothing of such a class can be promoted by it."""
    vocabulary = _vocabulary(root)
    if params.evaluate.encoders != "bundled" or vocabulary is None:
        return
    for class_noun in class_nouns:
        if unknown := vocabulary.parse(class_noun)[1]:
            yield (
                f"the bundled scorer does not know {', '.join(map(repr, unknown))} of the class {class_noun!r}: prompt "
                f"fidelity cannot be measured, and nothing is promoted; its words stand in {SCORER}/{VOCABULARY}"
            )


def foreign_scorer(root: Path, params: Params) -> Iterator[str]:
    """Say that the bundled scorer would judge pictures of a kind that it never saw."""
    if params.evaluate.encoders == "bundled" and not _is_bundled(root, params.base):
        yield (
            f"evaluate.encoders: bundled measures prompt fidelity by {SCORER}, which knows drawings of 64 pixels, and "
            f"the base is {params.base.pretrained_model_name_or_path}; for photos: evaluate.encoders: hub (DINO, CLIP) "
            "and evaluate.prompts: data/prompts/photo"
        )


def tokenizer_folder(root: Path, base: Base) -> Path | None:
    """Return where the tokenizer of a base lies: in its folder, or in the cache of the hub, which is not asked."""
    if (folder := root / base.pretrained_model_name_or_path).is_dir():
        return folder / "tokenizer"
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for name in ("tokenizer.json", "vocab.json"):
        try:
            found = try_to_load_from_cache(
                base.pretrained_model_name_or_path, f"tokenizer/{name}", revision=base.revision
            )
        except HFValidationError:  # neither a folder nor a hub id, which `locate` refuses
            return None
        if isinstance(found, str):
            return Path(found).parent
    return None


def _is_bundled(root: Path, base: Base) -> bool:
    return root / base.pretrained_model_name_or_path == root / BUNDLED


def _vocabulary(root: Path) -> Vocabulary | None:
    """Read the words of the bundled scorer; None where it is missing, or broken, as the evaluation will say."""
    path = root / SCORER / VOCABULARY
    try:
        return read_vocabulary(read_file(path), path)
    except DreamboothError:
        return None


def _evaluated(graph: Graph) -> list[str]:
    return [stage.key for stage in graph.stale if stage.entry == EVALUATE]
