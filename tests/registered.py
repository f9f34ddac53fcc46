"""A project with registered versions whose scores are known, for the tests of promotion, serving and erasure."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tiny_project import tiny_values, write_params

from dreambooth.folders import new_folder
from dreambooth.versions import choose, load_found

BISCUIT = "biscuit"
HOW = {"code": "1", "photos": "p"}


def write_export(root: Path, pipeline: Path, model: str, subject: str = BISCUIT, **about: Any) -> None:
    """Write export/<subject> of a tiny pipeline, as the model with this fingerprint."""
    defaults = {
        "subject": subject, "identifier": "sks", "class_noun": "dog", "instance_prompt": "a photo of sks dog",
        "resolution": 32, "scheduler": "ddim", "num_inference_steps": 2, "guidance_scale": 5.0, "negative_prompt": "",
    }  # fmt: skip
    with new_folder(root / "export" / subject, {"base": "b" * 64, "model": model, **about}) as target:
        shutil.copytree(pipeline, target, dirs_exist_ok=True)
        (target / "generation.json").write_text(json.dumps(defaults))
        (target / "README.md").write_text(f"# {subject} {model}\n")


def write_evaluation(
    root: Path, model: str, identity: float, how: dict[str, str] | None = None, **shift: float
) -> None:
    """Write build/biscuit/evaluation and metrics/biscuit.json: 8 prompts, a spread of .01, the base at .4."""
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.01, 8)
    parts = {"base": 0.4, "personalised": identity}
    prompts = [
        pd.DataFrame(
            {
                "kind": "recontextualisation", "prompt": [f"prompt {i}" for i in range(8)], "identity": level + noise,
                "prompt_fidelity": 0.5, "diversity": 0.5, "model": name,
            }
        )
        for name, level in parts.items()
    ]  # fmt: skip
    pres = [pd.DataFrame({"noise_seed": range(4), "pres": 0.3, "flat": False, "model": name}) for name in parts]
    copies = [pd.DataFrame({"copy": [False] * 8, "flat": False, "model": name}) for name in parts]
    models = {
        "base": {"model": "b" * 64, "is_base": True},
        "personalised": {"model": model, "is_base": False},
    }
    key = {"model": model, "fingerprint": (how or HOW)["code"] * 64}
    with new_folder(root / "build" / BISCUIT / "evaluation", key) as target:
        (target / "evaluation.json").write_text(json.dumps({"how": how or HOW, "models": models}))
        for file, tables in (("prompts", prompts), ("class_images", pres), ("scores", copies)):
            pd.concat(tables).to_csv(target / f"{file}.csv", index=False)
    (root / "metrics").mkdir(exist_ok=True)
    content = {"identity": {"personalised": identity, "gain": identity - 0.4}}
    (root / "metrics" / f"{BISCUIT}.json").write_text(json.dumps(content))


def write_project(root: Path, database: Path, **changes: Any) -> None:
    """Write params.yaml, dvc.yaml and an empty registry; `changes` go into the entry of the subject."""
    root.mkdir(parents=True)
    values = tiny_values()
    values["subjects"][BISCUIT] |= changes
    write_params(root, values)
    (root / "dvc.yaml").write_text("stages: {}\n")
    shutil.copyfile(database, root / "mlflow.db")


def load(root: Path, subject_id: str, version: int | None = None) -> Any:
    """Load a version to draw with: this one, else the champion, else the challenger, else the newest."""
    return load_found(root, choose(root, subject_id, version))


def command(root: Path, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run the dreambooth command in a project as a program of its own."""
    import os

    return subprocess.run(
        [sys.executable, "-m", "flows.cli", *arguments], cwd=root, capture_output=True, text=True, check=False,
        env=os.environ | {"COLUMNS": "200", "PYTHONPATH": str(Path(__file__).resolve().parents[1])} | environment,
    )  # fmt: skip


def add_champion(target: Path, source: Path) -> None:
    """Add the personalised model of an evaluation to another one, or to itself, as the champion that it is held to."""
    about = json.loads((target / "evaluation.json").read_text())
    about["models"]["champion"] = about["models"]["personalised"]
    (target / "evaluation.json").write_text(json.dumps(about))
    for file in ("prompts", "class_images", "scores"):
        table = pd.read_csv(source / f"{file}.csv")
        theirs = table[table["model"] == "personalised"].assign(model="champion")
        pd.concat([pd.read_csv(target / f"{file}.csv"), theirs]).to_csv(target / f"{file}.csv", index=False)
