"""A tiny real pipeline with random weights, a project around it, and photos to train it on."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_project import TINY_RESOLUTION, make_project, tiny_values, write_tokenizer

# Who exports what docs/operations.md says, or runs the tests in a hook of git, keeps project, servers and repository.
OF_THE_USER = ("DREAMBOOTH_", "PREFECT_", "MLFLOW_", "DVC_", "GIT_")
for name in [name for name in os.environ if name.startswith(OF_THE_USER) or name == "HF_TOKEN"]:
    del os.environ[name]
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
os.environ["DO_NOT_TRACK"] = "1"
os.environ["DVC_TEST"] = "true"  # tells nobody, and asks nobody for a newer version
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["DREAMBOOTH_TRACKING"] = "off"  # a new database takes seconds; who tests tracking takes this away
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models lose more to the threads' meetings than they win


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPU, unless the tests that need one are asked for: a process cannot have both, and a test says which."""
    if config.option.markexpr != "gpu":
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One more than there are cores: half of the time of a slow test it waits for a server or a process."""
    return (os.cpu_count() or 1) + 1


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files of slow tests first, so that at the end no core waits for the last of them."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session", autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep DVC and Prefect out of the home of whoever tests."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("DVC_SITE_CACHE_DIR", "DVC_GLOBAL_CONFIG_DIR", "DVC_SYSTEM_CONFIG_DIR", "PREFECT_HOME"):
            patch.setenv(name, str(folder / name))
        yield


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep every test out of the caches and settings of the one before."""
    monkeypatch.setenv("DREAMBOOTH_CACHE", str(tmp_path / "cache"))
    for name in ("DREAMBOOTH_DEBUG", "DREAMBOOTH_HOME", "DREAMBOOTH_SCRATCH", "MLFLOW_TRACKING_URI"):
        monkeypatch.setenv(name, "")  # so that they are gone after the test as well, whoever has set them in it
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated database without experiments: the first migration takes seconds."""
    from mlflow.tracking import MlflowClient

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A StableDiffusionPipeline in the layout of diffusers: every part is real, its weights are random."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = tmp_path_factory.mktemp("base") / "tiny"
    torch.manual_seed(0)
    write_tokenizer(folder / "tokenizer")
    text = CLIPTextConfig(
        vocab_size=514, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=40, bos_token_id=512, eos_token_id=513, pad_token_id=513,
    )  # fmt: skip
    CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16), latent_channels=4, norm_num_groups=4, sample_size=TINY_RESOLUTION,
    ).save_pretrained(folder / "vae")  # fmt: skip
    UNet2DConditionModel(
        sample_size=TINY_RESOLUTION // 2, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=8,
    ).save_pretrained(folder / "unet")  # fmt: skip
    DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1,
        set_alpha_to_one=False,
    ).save_pretrained(folder / "scheduler")  # fmt: skip
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.42.1",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "feature_extractor": [None, None],
        "safety_checker": [None, None],
        "requires_safety_checker": False,
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def params_values() -> dict[str, Any]:
    """Return the values of `tiny_values`, to be changed."""
    return tiny_values()


@pytest.fixture
def project(tmp_path: Path, tiny_model_folder: Path, params_values: dict[str, Any]) -> Path:
    """Return a project with the tiny pipeline as its base model and one subject of five photos."""
    return make_project(tmp_path / "project", tiny_model_folder, params_values)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 3 MB in memory: as this user, else as the root that sudo makes of it without asking."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size=3m,uid={os.getuid()}", "tmpfs", str(place)]
    for ahead in ([], ["sudo", "-n"]):
        if shutil.which((ahead or mount)[0]) and not subprocess.run([*ahead, *mount], capture_output=True).returncode:
            break
    else:
        pytest.skip("no small disk: this user may not mount, nor may its sudo without a password")
    yield place
    subprocess.run([*ahead, "umount", "--lazy", str(place)], check=True)
