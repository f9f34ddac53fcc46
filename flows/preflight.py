"""What params.yaml asks for in vain, told before the first stage: the one that refuses it comes after the training."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from dreambooth.bases import locate
from dreambooth.errors import DreamboothError
from dreambooth.identifiers import remarks_by_tokenizer
from dreambooth.params import Params
from dreambooth.prompts import load_templates
from dreambooth.vocabulary import SCORER, VOCABULARY, read_file, read_vocabulary
from flows.graph import GPU_ENTRIES, Graph

EVALUATE = "evaluate"


def require_inputs(root: Path, params: Params, graph: Graph) -> None:
    """Refuse what a stale stage would refuse: a base model that is nowhere, prompts that cannot be read.

    Raises:
        ModelError, EvaluationError: as the stage would.
    """
    if any(stage.entry in GPU_ENTRIES for stage in graph.stale):
        locate(params.base.pretrained_model_name_or_path, params.base.revision, root)
    for file in dict.fromkeys(map(params.prompts_file, _evaluated(graph))):
        load_templates(root / file)


def remarks(root: Path, params: Params, graph: Graph) -> list[str]:
    """Say what will be worse than its user may think, of the subjects whose evaluation is stale."""
    subjects = _evaluated(graph)
    tokenizer = root / params.base.pretrained_model_name_or_path / "tokenizer/tokenizer.json"
    identifiers = dict.fromkeys(params.subject(one).identifier for one in subjects)
    nouns = dict.fromkeys(params.class_of(one).class_noun for one in subjects)
    return [*remarks_by_tokenizer(identifiers, tokenizer), *unknown_nouns(root, params, nouns)]


def unknown_nouns(root: Path, params: Params, class_nouns: Iterable[str]) -> Iterator[str]:
    """Say which words of classes the bundled scorer never saw: nothing of such a class can be promoted by it."""
    path = root / SCORER / VOCABULARY
    if params.evaluate.encoders != "bundled" or not path.is_file():
        return
    try:
        vocabulary = read_vocabulary(read_file(path), path)
    except DreamboothError:  # the evaluation says what is wrong with the file
        return
    for class_noun in class_nouns:
        if unknown := vocabulary.parse(class_noun)[1]:
            yield (
                f"the bundled model does not know {', '.join(map(repr, unknown))} of the class {class_noun!r}: prompt "
                f"fidelity cannot be measured, and nothing is promoted; its words stand in {SCORER}/{VOCABULARY}"
            )


def _evaluated(graph: Graph) -> list[str]:
    return [stage.key for stage in graph.stale if stage.entry == EVALUATE]
