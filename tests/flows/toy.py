"""Stand in for the stages of a toy project: real files and manifests, no model; `fail-<stage>-<id>` makes one fail."""

import json
import os
import sys
import time
from pathlib import Path

from PIL import Image

from dreambooth.folders import new_folder

OUTPUTS = {
    "prior": "build/classes/{}",
    "validate": "build/{}/instance",
    "train": "models/{}",
    "evaluate": "build/{}/evaluation",
    "report": "reports/{}",
    "export": "export/{}",
}


def main(stage: str, key: str) -> None:
    with Path(os.environ.get("TOY_LOG", "ran.log")).open("a") as log:
        log.write(f"{stage}@{key}\n")
    if Path(f"fail-{stage}-{key}").exists():
        sys.stderr.write("some words\nE_TRAIN: the loss is NaN at step 3; lower train.learning_rate\n")
        raise SystemExit(6)
    if Path(f"slow-{stage}-{key}").exists():
        Path(f"started-{stage}-{key}").touch()
        time.sleep(60)
    if Path(f"tells-{stage}-{key}").exists():
        sys.stderr.write(f"signed in with {os.environ['HF_TOKEN']} at https://me:{os.environ['HF_TOKEN']}@hub\n")
    if (steps := Path(f"steps-{stage}-{key}")).exists():
        take_steps(key, int(steps.read_text()))
    if Path("pipeline").is_dir() and stage in ("evaluate", "export"):
        write_registrable(stage, key)
        return
    sys.stderr.write("\r 50%|=====     | 1/2\r100%|==========| 2/2\n")
    with new_folder(Path(OUTPUTS[stage].format(key)), {}) as folder:
        count = 2 if stage == "prior" else 1
        for number in range(count):
            Image.new("RGB", (8, 8), "tan").save(folder / f"{number:05d}.png")
        if stage == "evaluate":
            (folder / "00000.png").rename(folder / "grid.png")
        (folder / "which.txt").write_text(f"{stage} {key}")
        if stage == "report":
            identity = json.loads(Path(f"metrics/{key}.json").read_text())["identity"]
            told = {"title": key, "decision": {"line": "promote: identity +0.300"}, "metrics": {"identity": identity}}
            (folder / "report.json").write_text(json.dumps(told))
            (folder / "index.html").write_text("a page")
            (folder / "prompts.csv").write_text("prompt,identity\nin space,0.6\n")
    if stage == "evaluate":
        write_metrics(key)
    if stage == "prior":
        sys.stdout.write("prior dog: 0 reused, 2 generated\n")


def take_steps(key: str, count: int) -> None:
    """Take half a second for each step, and keep the number of those that are done in the scratch folder."""
    checkpoint = Path(os.environ["DREAMBOOTH_SCRATCH"]) / f"toy-{key}"
    first = int(checkpoint.read_text()) if checkpoint.exists() else 0
    for step in range(first, count):
        time.sleep(0.5)
        with Path(os.environ["TOY_LOG"]).open("a") as log:
            log.write(f"step {step} of {key} on {os.environ['TOY_MACHINE']}\n")
        checkpoint.write_text(str(step + 1))
    checkpoint.unlink()


def write_metrics(key: str) -> None:
    Path("metrics").mkdir(exist_ok=True)
    scores = {"base": 0.3, "personalised": 0.6, "gain": 0.3, "low": 0.2, "high": 0.4, "ceiling": 0.7}
    Path(f"metrics/{key}.json").write_text(json.dumps({"identity": {**scores, "calibrated": 0.75}, "prompts": 2}))


def write_registrable(stage: str, key: str) -> None:
    """Write what the real registry and the real gate take: a tiny pipeline, and scores that are better."""
    from registered import write_evaluation, write_export

    if stage == "export":
        write_export(Path(), Path("pipeline"), "1" * 64, key)
    else:
        write_evaluation(Path(), "1" * 64, 0.5)
        write_metrics(key)


if __name__ == "__main__":
    main(*sys.argv[1:])
