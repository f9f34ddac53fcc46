"""Does the gate refuse what it has to refuse? Real trainings, each held against the one of params.yaml.

    python -m benchmarks.refusals [--subject biscuit] [--other FOLDER] [--steps N]

The champion is trained as params.yaml says. The first challenger has ten times the steps and no class images, so that
it learns the photos by heart; the second was trained on photos of another subject of the class, those in FOLDER.
All are evaluated beside each other on the prompts and seeds of params.yaml. Takes about thirteen trainings of time.
"""

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

from dreambooth.gate import Decision, decide, read_scorecard
from dreambooth.params import Params, load_params
from dreambooth.yaml12 import dump_yaml, load_yaml
from stages import evaluate, prior, train, validate
from stages.entry import say

ROOT = Path(__file__).resolve().parents[1]
LONGER = 10


def make_project(root: Path, **changes: Any) -> Params:
    """Make a project of its own with the bundled data; `changes` go into the section train."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "data").mkdir(exist_ok=True)
    for name in ("base", "prompts"):
        if not (root / "data" / name).exists():
            (root / "data" / name).symlink_to(ROOT / "data" / name)
    values = load_yaml((ROOT / "params.yaml").read_text(encoding="utf-8"))
    values["train"] |= changes
    (root / "params.yaml").write_text(dump_yaml(values), encoding="utf-8")
    return load_params(root / "params.yaml")


def take_photos(root: Path, photos: Path, subject_id: str) -> None:
    """Put photos in the place of the subject's."""
    place = root / "data/subjects" / subject_id
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(photos, place)


def train_on(root: Path, params: Params, subject_id: str, photos: Path) -> Path:
    """Train on photos; return the folder of the trained parts."""
    take_photos(root, photos, subject_id)
    validate.run(params, subject_id, root)
    if params.train.prior_loss_weight > 0:
        prior.run(params, params.subject(subject_id).class_id, root)
    train.run(params, subject_id, root)
    return root / train.OUTPUTS[0].format(id=subject_id)


def held_against(root: Path, params: Params, subject_id: str, champion: Path, photos: Path) -> Decision:
    """Evaluate the challenger of a project beside the champion, both by the photos of the subject, and decide."""
    take_photos(root, photos, subject_id)
    validate.run(params, subject_id, root)
    target = root / "beside"
    evaluate.beside_champion(params, subject_id, root, champion, "champion", target)
    challenger, other = (read_scorecard(target, name) for name in ("personalised", "champion"))
    return decide(challenger, other, params.gate, params.evaluate.confidence)


def main() -> None:
    """Train the three, decide, and exit with 1 if the gate lets one pass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subject", default="biscuit")
    parser.add_argument("--other", type=Path, help="photos of another subject of the class")
    parser.add_argument("--steps", type=int, help="of the champion's training, else those of params.yaml")
    given = parser.parse_args()
    photos = ROOT / "data/subjects" / given.subject
    settings = load_params(ROOT / "params.yaml").train
    steps = given.steps or settings.max_train_steps or 400
    plain = {"max_train_steps": steps, "preview_steps": None, "evaluation_steps": None}
    challengers: dict[str, tuple[Path, dict[str, Any]]] = {
        "overfitted": (photos, plain | {"max_train_steps": LONGER * steps, "prior_loss_weight": 0.0})
    }
    if given.other:
        challengers["another subject"] = (given.other, plain)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        champion = train_on(root / "champion", make_project(root / "champion", **plain), given.subject, photos)
        passed = False
        for name, (taught, changes) in challengers.items():
            params = make_project(root / name, **changes)
            train_on(root / name, params, given.subject, taught)
            decision = held_against(root / name, params, given.subject, champion, photos)
            say(f"{name}: {decision.line}")
            passed |= decision.verdict == "promote"
    raise SystemExit(passed)


if __name__ == "__main__":
    main()
