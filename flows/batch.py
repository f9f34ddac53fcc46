"""Draw many pictures of a subject with its registered version as a Prefect flow, on a worker with a GPU."""

from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.states import Completed

from dreambooth.errors import DreamboothError
from dreambooth.params import load_params
from flows.generate import call_options, draw_registered, require_drawable
from flows.program import failed, left
from flows.project import PARAMS, find_root
from flows.summary import picture_uri
from flows.turns import gpu_of_server


@flow(name="generate", persist_result=False)
def generate(
    subject: str,
    prompts: list[str],
    count: int = 4,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    negative: str | None = None,
    size: int | None = None,
    batch_size: int = 1,
    version: int | None = None,
    folder: str | None = None,
    root: str | None = None,
) -> Any:
    """Draw each prompt with `count` seeds; the contact sheet is an artifact of the run.

    Args:
        subject: an id.
        prompts: sentences; {} stands for the subject.
        count: pictures a prompt; picture i has the seed `seed` + i.
        seed: of the first picture.
        steps: of the sampler; None for the model's own, as of the next three.
        guidance: weight of the prompt.
        negative: what the pictures must not show.
        size: side in pixels.
        batch_size: pictures of a prompt at once, 1 to 64; more than 1 is faster on a GPU and changes their last bits.
        version: of the registered model; None for the champion, else the challenger, else the newest.
        folder: where the files go; None for build/<id>/generated.
        root: folder of the project; None looks in DREAMBOOTH_HOME, here, and above.
    """
    options = call_options(seed, steps, guidance, negative, size, batch_size)
    try:
        project = find_root(root)
        load_params(project / PARAMS).subject(subject)
        require_drawable(subject, prompts, count)  # before its turn on the GPU
        log, target = get_run_logger(), Path(folder) if folder else None
        with gpu_of_server(log.warning):
            drawn = draw_registered(project, subject, prompts, count, options, log.info, log.warning, version, target)
    except DreamboothError as error:
        return failed(error)
    sheet = f"{drawn.sheet.parent}\n\n![sheet]({picture_uri(drawn.sheet)})"
    left(create_markdown_artifact, sheet, f"pictures-{subject}", f"{len(drawn.pictures)} pictures")
    return Completed(message=f"{len(drawn.pictures)} pictures in {drawn.sheet.parent}")
