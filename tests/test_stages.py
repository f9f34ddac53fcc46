"""Every stage, run for real on a tiny pipeline: what it reads, writes, reuses and refuses."""

from pathlib import Path

from dreambooth.params import load_params
from stages import evaluate, export, prior, train, validate


def run_all(root: Path) -> None:
    params = load_params(root / "params.yaml")
    validate.run(params, "biscuit", root)
    prior.run(params, "dog", root)
    train.run(params, "biscuit", root)
    evaluate.run(params, "biscuit", root)
    export.run(params, "biscuit", root)


def test_stages_chain_from_photos_to_export(project: Path) -> None:
    run_all(project)
    assert (project / "export/biscuit/model_index.json").exists()
