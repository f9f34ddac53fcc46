"""What the hub says no to, and what it has no time for, is told with the step that helps, and not asked twice."""

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from tiny_project import REPOSITORY

from dreambooth.errors import ModelError
from dreambooth.models import _HUB_DUPLICATES, _HUB_FILES, resolve_model

COMMIT = "a" * 40
GATED = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model o/gated is restricted. Please log in."}
ANSWERS: dict[str, tuple[int, dict[str, str]]] = {
    "gated": (401, GATED),
    "unasked": (403, GATED),
    "expired": (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
    "forbidden": (403, {}),
    "private": (401, {"X-Error-Code": "RepoNotFound"}),
    "none": (404, {"X-Error-Code": "RepoNotFound"}),
    "moved": (404, {"X-Error-Code": "RevisionNotFound"}),
    "busy": (503, {}),
}
LACKS = {"pickled": (404, {"X-Error-Code": "EntryNotFound"})}
TOLD = {
    "gated": r"o/gated at a{40} is gated \(401\): accept its licence on URL/o/gated, then sign in .*HF_TOKEN, or hf",
    "unasked": r"o/unasked at a{40} is gated \(403\): accept its licence on URL/o/unasked, then sign in",
    "expired": r"the hub refuses .*o/expired at a{40} \(401\); look at URL/o/expired, and sign in .*HF_TOKEN",
    "forbidden": r"the hub refuses .*o/forbidden at a{40} \(403\); look at URL/o/forbidden, and sign in",
    "private": r"the hub shows no o/private \(401\); look at its name on URL/o/private; if it is private, sign in",
    "none": r"the hub shows no o/none \(404\); look at its name on URL/o/none",
    "moved": r"the hub has no such commit of o/moved: a{40}; take one of URL/o/moved/commits/main",
    "busy": r"o/busy at a{40} is neither on this machine nor to be had from the hub \(Server error '503 .*hf download",
}
PROGRAM = """
import json, sys, time
from pathlib import Path
from dreambooth.errors import ModelError
from dreambooth.hub_encoders import DinoEncoder
from dreambooth.models import resolve_model
time.sleep = lambda seconds: None
told = {}
for name in sys.argv[1:]:
    for load in (lambda: resolve_model(f"o/{name}", 40 * "a", Path()), lambda: DinoEncoder(f"o/{name}", 40 * "a")):
        try:
            load()
        except ModelError as error:
            told.setdefault(name, []).append(str(error))
print(json.dumps(told))
"""
PICKLED = """
import sys, threading
from dreambooth.hub_encoders import DinoEncoder
DinoEncoder("o/pickled", 40 * "a")
for thread in threading.enumerate():
    if thread is not threading.current_thread():
        thread.join(20)
"""


@pytest.fixture
def hub() -> Iterator[tuple[str, Counter[str]]]:
    """Serve an endpoint that answers as the hub does; yield its address and how often each model was asked for."""
    asked: Counter[str] = Counter()

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.partition("/o/")[2].partition("/")[0]
            asked[name, "tree" if "/tree/" in self.path else "api" if "/api/" in self.path else "file"] += 1
            status, headers = (ANSWERS | LACKS)[name]
            self.send_response(status)
            for header, value in {**headers, "Content-Length": "0"}.items():
                self.send_header(header, value)
            self.end_headers()

        do_HEAD = do_GET  # noqa: N815 - the name that http.server asks for

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()


def ask(names: list[str], tmp_path: Path, **settings: str) -> dict[str, list[str]]:
    """Return what a base and an encoder of each name are refused with."""
    environment = {**os.environ, "HF_HOME": str(tmp_path), "PYTHONPATH": str(REPOSITORY), **settings}
    command = [sys.executable, "-c", PROGRAM, *names]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
    told: dict[str, list[str]] = json.loads(done.stdout)
    return told


@pytest.mark.slow
@pytest.mark.fault(27, 28)
def test_a_no_of_the_hub_is_told_with_its_remedy_and_only_a_busy_hub_is_asked_again(
    hub: tuple[str, Counter[str]], tmp_path: Path
) -> None:
    url, asked = hub
    found = ask(list(ANSWERS), tmp_path, HF_HUB_OFFLINE="0", HF_ENDPOINT=url)
    for name, lines in found.items():
        assert len(lines) == 2
        for line in lines:
            assert re.search(TOLD[name].replace("URL", re.escape(url)), line), line
            assert "\n" not in line
    assert set(found) == set(ANSWERS)
    trees = {name: asked[name, "tree"] for name in ANSWERS}
    assert trees.pop("busy") == 6
    assert set(trees.values()) == {1}
    assert all(asked[name, "file"] <= 2 for name in ANSWERS if name != "busy")  # config.json, adapter_config.json


@pytest.mark.slow
def test_nobody_is_asked_to_convert_the_pickled_weights_of_an_encoder(
    hub: tuple[str, Counter[str]], tmp_path: Path
) -> None:
    """transformers looks for a pull request with safetensors, and has one made where there is none."""
    from transformers import ViTConfig, ViTModel

    url, asked = hub
    width = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = ViTModel(ViTConfig(**width, image_size=224, patch_size=56), add_pooling_layer=False)
    snapshot = tmp_path / "hub/models--o--pickled/snapshots" / COMMIT
    model.config.save_pretrained(snapshot)
    torch.save(model.state_dict(), snapshot / "pytorch_model.bin")
    online = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": url, "HF_HOME": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, "-c", PICKLED], cwd=REPOSITORY, env=os.environ | online, check=True)
    assert asked["pickled", "file"] > 0
    assert asked["pickled", "api"] == 0


@pytest.mark.slow
@pytest.mark.fault(27, 28)
def test_a_hub_that_is_not_reached_is_told_with_the_command_that_fetches(tmp_path: Path) -> None:
    for settings, why in (
        ({"HF_HUB_OFFLINE": "1"}, r"\(.*(offline mode is enabled|outgoing traffic has been disabled)"),
        ({"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}, r"\(\[Errno 111\] Connection refused\)"),
    ):
        (lines,) = ask(["base"], tmp_path, **settings).values()
        for line in lines:
            assert re.search(rf"o/base at a{{40}} is neither .*{why}.*: hf download o/base --revision a{{40}}", line), (
                line
            )


def test_the_command_that_fetches_fetches_what_the_program_does(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="hf download o/base") as refused:
        resolve_model("o/base", COMMIT, tmp_path)
    words = shlex.split(str(refused.value).partition("hf download ")[2])
    chosen: dict[str, list[str]] = {"--include": [], "--exclude": []}
    for option, pattern in itertools.pairwise(words):
        if option in chosen:
            chosen[option].append(pattern)
    weights = "unet/diffusion_pytorch_model"
    files = [f"{weights}{kind}" for kind in (".safetensors", ".fp16.safetensors", ".non_ema.safetensors", ".bin")]
    files += ["model_index.json", "v1-5-pruned.safetensors", "tokenizer/merges.txt", "text_encoder/model.fp16.bin"]
    told = filter_repo_objects(files, allow_patterns=chosen["--include"], ignore_patterns=chosen["--exclude"])
    ours = list(filter_repo_objects(files, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_DUPLICATES))
    assert list(told) == ours == [f"{weights}.safetensors", "model_index.json", "tokenizer/merges.txt"]
