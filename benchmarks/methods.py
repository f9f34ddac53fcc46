"""Every method on the bundled model at the same budget: docs/results.md, and a picture of it.

    python -m benchmarks.methods [--subject biscuit] [--method lora] [--steps N] [--rate lora=5e-4]

Each method is a project of its own with the photos, steps, rows, prompts and seeds of params.yaml, and runs the real
stages, each a process: validate, prior, train, evaluate. Class images and the pictures of the base are drawn once for
all of them. A method that is done is read again, so a killed run loses one method; another base, other photos or
other parameters are done anew. --fresh does all of them anew.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import usage
from benchmarks.results import picture, write_page
from benchmarks.usage import NOTHING, Usage
from dreambooth.folders import code_hash, scratch_folder, sha256_of, sha256_of_file, write_file
from dreambooth.intervals import in_interval
from dreambooth.params import TOKEN_METHODS, parse_params
from dreambooth.yaml12 import dump_yaml, load_yaml
from stages.entry import say

ROOT = Path(__file__).resolve().parents[1]
DONE = "done.json"
# What each method is told besides params.yaml. Sources: docs/log.md (rates of full on the bundled model; a LoRA at 1e-3
# of rank 16, a word at 3e-3); 5e-3 is the rate of Gal et al. 2023. Rates of photo-scale models are too small here: the
# bundled one is far smaller, and its full training takes fifty times the rate of SD1.5.
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"rank": 16, "lora_alpha": 16.0, "learning_rate": 1e-3},
    "pivotal": {"rank": 16, "lora_alpha": 16.0, "learning_rate": 1e-3, "embedding_learning_rate": 3e-3},
    "textual_inversion": {"learning_rate": 5e-3},
}


@dataclass(frozen=True)
class Result:
    """What one method made of one subject.

    Attributes:
        subject: its id.
        method: see METHODS.
        changes: what its training was told besides params.yaml.
        metrics: of the evaluation.
        train: what the training cost.
        size: of what was trained, in bytes.
        project: where its pictures lie.
    """

    subject: str
    method: str
    changes: dict[str, Any]
    metrics: dict[str, Any]
    train: Usage
    size: int
    project: Path


def parameters(values: Mapping[str, Any], subject: str, method: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return params.yaml of a project with one subject and one method; the rest is as in `values`.

    Args:
        values: of the project's own params.yaml, with the common budget.
        subject: its id.
        method: see METHODS.
        changes: of the section train.
    """
    of_subject = dict(values["subjects"][subject])
    if method in TOKEN_METHODS:  # the identifier of params.yaml is a word of the base
        of_subject["identifier"] = f"<{subject}>"
    train = values["train"] | {"preview_steps": None, "evaluation_steps": None, "load_best_model_at_end": False}
    return dict(values) | {
        "classes": {of_subject["class_id"]: values["classes"][of_subject["class_id"]]},
        "subjects": {subject: of_subject},
        "train": train | {"early_stopping_patience": None, "method": method} | dict(changes),
        "export": values["export"] | {"formats": ["diffusers"]},
    }


def measure(folder: Path, source: Path, values: Mapping[str, Any], method: str) -> Result:
    """Run one method on one subject, or read what it made before.

    Args:
        folder: of the whole benchmark; holds a project for each subject and method, and the shared cache.
        source: project whose photos, base models and prompts are taken.
        values: of its params.yaml, see `parameters`.
        method: see METHODS.
    """
    (subject,) = values["subjects"]
    project, key = folder / f"{subject}-{method}", _key(source, values, subject)
    done = project / DONE
    before = json.loads(done.read_text(encoding="utf-8")) if done.is_file() else {}
    if before.get("key") != key:
        shutil.rmtree(project, ignore_errors=True)
        before = {"key": key} | _run(folder, project, source, values)
        write_file(done, json.dumps(before, indent=1).encode() + b"\n")
    changes = {name: values["train"][name] for name in ("learning_rate", *METHODS[method])}
    metrics, train, size = before["metrics"], Usage(**before["train"]), before["size"]
    return Result(subject, method, changes, metrics, train, size, project)


def _run(folder: Path, project: Path, source: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    ((subject, about),) = values["subjects"].items()
    (project / "data/classes").mkdir(parents=True)
    for name in ("base", "prompts"):
        (project / "data" / name).symlink_to((source / "data" / name).absolute())
    shutil.copytree(source / "data/subjects" / subject, project / "data/subjects" / subject)
    (project / "params.yaml").write_text(dump_yaml(values), encoding="utf-8")
    own = {"DREAMBOOTH_CACHE": str(folder / "cache"), "DREAMBOOTH_TRACKING": "off", "PYTHONPATH": str(ROOT)}
    environment = {name: value for name, value in os.environ.items() if name != "DREAMBOOTH_SCRATCH"} | own
    cost: dict[str, Usage] = {}
    for stage in ("validate", "prior", "train", "evaluate"):
        command = [sys.executable, "-m", f"stages.{stage}", about["class_id"] if stage == "prior" else subject]
        cost[stage] = usage.run(command, project, environment, project / "log")
    return {
        "metrics": json.loads((project / f"metrics/{subject}.json").read_text(encoding="utf-8")),
        "train": asdict(cost["train"]),
        "whole": asdict(sum(cost.values(), NOTHING)),
        "size": sum(path.stat().st_size for path in (project / "models" / subject).rglob("*.safetensors")),
    }


def _key(source: Path, values: Mapping[str, Any], subject: str) -> str:
    """Return what a result depends on: another base is another result."""
    files = [
        path
        for place in (f"subjects/{subject}", "base", "prompts")
        for path in sorted((source / "data" / place).rglob("*"))
        if path.is_file()
    ]
    return sha256_of([dict(values), code_hash(), [sha256_of_file(path) for path in files]])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every method on every subject; write the page and the picture after each."""
    given = _parser().parse_args(arguments)
    values = load_yaml((given.project / "params.yaml").read_text(encoding="utf-8"))
    for section, name, value in (
        ("train", "max_train_steps", given.steps),
        ("evaluate", "max_prompts", given.prompts),
        ("evaluate", "num_class_images", given.class_images),
    ):
        values[section][name] = values[section][name] if value is None else value
    rates = dict(given.rate)
    todo = []
    for subject in given.subject or values["subjects"]:
        for method in given.method or METHODS:
            changes = METHODS[method] | ({"learning_rate": rates[method]} if method in rates else {})
            todo.append((subject, method, parameters(values, subject, method, changes)))
    for *_, one in todo:
        parse_params(one)  # a mistake of any method is told before the first one runs
    folder = given.folder or scratch_folder(given.project) / "methods"
    if given.fresh:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    results, began = [], time.monotonic()
    for number, (subject, method, one) in enumerate(todo):
        left = (time.monotonic() - began) / number * (len(todo) - number) / 60 if number else None
        say(f"[{number + 1}/{len(todo)}] {subject}: {method}" + (f", about {left:.0f} min left" if left else ""))
        results.append(measure(folder, given.project, one, method))
        gain = results[-1].metrics["identity"]
        say(f"    identity {in_interval(gain['gain'], gain['low'], gain['high'])}")
        write_page(given.out, results, values, given.picture)
        picture(given.picture, results, values)
    say(f"{given.out}, {given.picture}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subject", action="append", help="of params.yaml, may be repeated; all if none is named")
    parser.add_argument("--method", action="append", choices=METHODS, help="may be repeated; all if none is named")
    parser.add_argument("--steps", type=int, help="of every training, else as in params.yaml")
    parser.add_argument("--prompts", type=int, help="of every evaluation, else as in params.yaml")
    parser.add_argument("--class-images", type=int, help="of every evaluation, else as in params.yaml")
    parser.add_argument("--rate", type=_rate, action="append", default=[], metavar="METHOD=RATE")
    parser.add_argument("--project", type=Path, default=ROOT, help="whose params.yaml, photos and base are taken")
    parser.add_argument("--folder", type=Path, help="keeps what is done; else <scratch>/methods of the project")
    parser.add_argument("--fresh", action="store_true", help="do all of it anew")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results.md")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/images/methods.png")
    return parser


def _rate(text: str) -> tuple[str, float]:
    method, _, rate = text.partition("=")
    if method not in METHODS:
        raise argparse.ArgumentTypeError(f"should be METHOD=RATE, METHOD one of {', '.join(METHODS)} (got {text!r})")
    return method, float(rate)


if __name__ == "__main__":
    main()
