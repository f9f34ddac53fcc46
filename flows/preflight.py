"""What params.yaml asks for in vain, told before the first stage: the one that refuses it comes after the training."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from dreambooth.bases import LOCAL_MODELS, locate
from dreambooth.errors import DreamboothError
from dreambooth.identifiers import COMMON, remarks_by_tokenizer
from dreambooth.params import Base, Params
from dreambooth.prompts import templates_of
from dreambooth.registry import require_plain_path
from dreambooth.vocabulary import SCORER, VOCABULARY, Vocabulary, read_file, read_vocabulary, split
from flows.graph import GPU_ENTRIES, Graph

EVALUATE = "evaluate"
BUNDLED = f"{LOCAL_MODELS}/emoji64"  # the base that the bundled scorer was taught beside
RIFLE = "sks"  # the identifier of the paper's reference implementations; no caption of the bundled base has it


def require_inputs(root: Path, params: Params, graph: Graph) -> None:
    """Refuse what a stale stage or the registration would refuse: a base model that is nowhere, prompts, a path.

    Raises:
        ModelError, EvaluationError, RegistryError: as they would.
    """
    require_plain_path(root)
    if any(stage.entry in GPU_ENTRIES for stage in graph.stale):
        locate(params.base.pretrained_model_name_or_path, params.base.revision, root)
    for file in dict.fromkeys(map(params.prompts_file, _evaluated(graph))):
        templates_of(root, file)


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
