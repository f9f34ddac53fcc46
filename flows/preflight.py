"""What params.yaml asks for in vain, told before the first stage: the one that refuses it comes after the training."""

from collections.abc import Iterator
from pathlib import Path

from dreambooth.bases import locate
from dreambooth.errors import DreamboothError
from dreambooth.identifiers import remarks_by_tokenizer
from dreambooth.params import Params
from dreambooth.prompts import Template, load_templates
from dreambooth.vocabulary import SCORER, VOCABULARY, read_file, read_vocabulary
from flows.graph import GPU_ENTRIES, Graph

EVALUATE = "evaluate"


def templates_of(root: Path, params: Params, subject_id: str) -> list[Template]:
    """Read the prompts that the evaluation of a subject chooses from."""
    return load_templates(root / params.evaluate.prompts / f"{params.subject(subject_id).prompt_kind}.csv")


def require_inputs(root: Path, params: Params, graph: Graph) -> None:
    """Refuse what a stale stage would refuse: a base model that is nowhere, prompts that cannot be read.

    Raises:
        ModelError, EvaluationError: as the stage would.
    """
    if any(stage.entry in GPU_ENTRIES for stage in graph.stale):
        locate(params.base.pretrained_model_name_or_path, params.base.revision, root)
    for subject_id in _evaluated(graph):
        templates_of(root, params, subject_id)


def remarks(root: Path, params: Params, graph: Graph) -> list[str]:
    """Say what will be worse than its user may think, of the subjects whose evaluation is stale."""
    found: dict[str, None] = {}  # each once, in their order
    tokenizer = root / params.base.pretrained_model_name_or_path / "tokenizer/tokenizer.json"
    for subject_id in _evaluated(graph):
        found |= dict.fromkeys(remarks_by_tokenizer(params.subject(subject_id).identifier, tokenizer))
        found |= dict.fromkeys(unknown_noun(root, params, params.class_of(subject_id).class_noun))
    return list(found)


def unknown_noun(root: Path, params: Params, class_noun: str) -> Iterator[str]:
    """Say which words of a class the bundled scorer never saw: nothing of that class can be promoted by it."""
    path = root / SCORER / VOCABULARY
    if params.evaluate.encoders != "bundled" or not path.is_file():
        return
    try:
        _, unknown = read_vocabulary(read_file(path), path).parse(class_noun)
    except DreamboothError:  # the evaluation says what is wrong with the file
        return
    if unknown:
        yield (
            f"the bundled model does not know {', '.join(map(repr, unknown))} of the class {class_noun!r}: prompt "
            f"fidelity cannot be measured, and nothing is promoted; its words stand in {SCORER}/{VOCABULARY}"
        )


def _evaluated(graph: Graph) -> list[str]:
    return [stage.key for stage in graph.stale if stage.entry == EVALUATE]
