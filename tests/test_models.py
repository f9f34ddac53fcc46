"""Models are loaded from safetensors alone, refused with the reason, and written as diffusers reads them."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from dreambooth.bases import locate
from dreambooth.errors import ModelError
from dreambooth.models import load_model, model_hash, resolve_model, save_parts, write_pipeline


@pytest.fixture
def copy(tiny_model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "copy"))


def test_all_weights_are_frozen_and_in_evaluation_mode(tiny_model_folder: Path) -> None:
    model = load_model(tiny_model_folder)
    for module in (model.unet, model.vae, model.text_encoder):
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())


def test_the_hash_follows_the_content_and_not_the_place(tiny_model_folder: Path, copy: Path) -> None:
    assert model_hash(copy) == model_hash(tiny_model_folder)
    weights = copy / "unet/diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert model_hash(copy) != model_hash(tiny_model_folder)
    assert model_hash(copy, ["vae"]) == model_hash(tiny_model_folder, ["vae"])


def as_other_pipeline(folder: Path) -> None:
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))


def as_pickle(folder: Path) -> None:
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))


def as_half(folder: Path) -> None:
    for weights in list(folder.rglob("*.safetensors")):
        weights.rename(weights.with_suffix(".fp16.safetensors"))


def cut_short(folder: Path) -> None:
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (as_other_pipeline, "FluxPipeline; a StableDiffusionPipeline or a StableDiffusionXLPipeline"),
        (as_pickle, r"no plain .safetensors in unet \(weights there: diffusion_pytorch_model.bin\).*convert pickles"),
        (as_half, r"in unet, vae, text_encoder \(weights .*model.fp16.safetensors\); .*rename x.fp16.safetensors to x"),
        (cut_short, "cannot be loaded .*; fetch it again"),
        (lambda folder: shutil.rmtree(folder / "vae"), "lacks vae"),
        (lambda folder: (folder / "unet/evil.py").write_text("1/0"), r"holds code \(evil.py\)"),
        (lambda folder: (folder / "model_index.json").unlink(), "model_index.json is missing"),
        (lambda folder: (folder / "model_index.json").write_text("{"), "is not JSON"),
    ],
)
@pytest.mark.fault(27)
@pytest.mark.threat(11, 13)
def test_a_folder_that_is_no_pipeline_is_refused(copy: Path, damage: Callable[[Path], None], said: str) -> None:
    damage(copy)
    with pytest.raises(ModelError, match=said):
        load_model(copy)


def cut_in_two(folder: Path, part: str, second: str) -> Path:
    """Put half of the weights of a part into another file, named as from the part, and an index beside the first."""
    (weights,) = (folder / part).glob("*.safetensors")
    tensors = load_file(weights)
    names = sorted(tensors)
    shards = {"first.safetensors": names[::2], second: names[1::2]}
    for file, held in shards.items():
        place, content = folder / part / file, {name: tensors[name] for name in held}
        place.parent.mkdir(parents=True, exist_ok=True)
        if file.endswith(".bin"):
            torch.save(content, place)
        else:
            save_file(content, place, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, held in shards.items() for name in held}}
    weights.with_name(f"{weights.name}.index.json").write_text(json.dumps(index))
    weights.unlink()
    return folder / part / second


def test_weights_in_shards_are_loaded_and_stand_in_the_hash(copy: Path) -> None:
    whole = load_model(copy).text_encoder.state_dict()
    shard = cut_in_two(copy, "text_encoder", "second.safetensors")
    parts = load_model(copy).text_encoder.state_dict()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    before = model_hash(copy)
    shard.write_bytes(shard.read_bytes()[:-1] + b"\1")
    assert model_hash(copy) != before


@pytest.mark.threat(11)
@pytest.mark.parametrize("part", ["text_encoder", "unet"])
@pytest.mark.parametrize(
    "second",
    ["../../outside/x.safetensors", "../../outside/x.bin", "part-2.dat", "below/x.safetensors", "x.fp16.safetensors"],
)
def test_shards_that_are_no_safetensors_beside_their_index_are_refused(copy: Path, part: str, second: str) -> None:
    cut_in_two(copy, part, second)
    told = rf"{part}/\w+.safetensors.index.json names {re.escape(second)}, which should be .safetensors beside it"
    with pytest.raises(ModelError, match=told):
        load_model(copy)


def test_an_index_without_a_map_is_refused(copy: Path) -> None:
    (copy / "unet/diffusion_pytorch_model.safetensors.index.json").write_text("{}")
    with pytest.raises(ModelError, match=r"names None, which should be \.safetensors beside it"):
        load_model(copy)


@pytest.mark.parametrize(
    "error", [RuntimeError("[enforce fail at alloc_cpu.cpp:117] . can't allocate memory"), PermissionError(13, "no")]
)
def test_what_the_machine_lacks_is_not_taken_for_a_torn_file(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*given: Any, **named: Any) -> Any:
        raise error

    monkeypatch.setattr(diffusers.UNet2DConditionModel, "from_pretrained", fail)
    with pytest.raises(type(error)) as raised:
        load_model(tiny_model_folder)
    assert raised.value is error


@pytest.fixture
def snapshot(tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy the tiny pipeline into a cache of the hub, as o/base at a commit."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "hub/models--o--base/snapshots" / ("a" * 40)))


@pytest.mark.threat(11)
def test_files_that_other_programs_fetched_into_the_cache_of_the_hub_are_no_fault_of_the_base(
    snapshot: Path, tmp_path: Path
) -> None:
    before = model_hash(snapshot)
    for name in ("unet/diffusion_pytorch_model.bin", "text_encoder/openvino_model.bin", "v1-5.ckpt", "handler.py"):
        (snapshot / name).write_bytes(b"\x80\x04.")
    found = resolve_model("o/base", "a" * 40, tmp_path)
    assert load_model(found).unet.dtype == torch.float32
    assert model_hash(found) == before
    (snapshot / "text_encoder/adapter_model.bin").write_bytes(b"\x80\x04.")  # transformers would read it
    with pytest.raises(ModelError, match=r"holds pickles \(text_encoder/adapter_model.bin\)"):
        load_model(found)
    (snapshot / "text_encoder/adapter_model.bin").unlink()
    own = Path(shutil.copytree(snapshot, tmp_path / "data/base/own"))
    (own / "handler.py").unlink()
    with pytest.raises(ModelError, match=r"holds pickles \(text_encoder/openvino_model.bin, unet/diff.*v1-5.ckpt\)"):
        load_model(own)


def test_a_hub_model_of_other_precisions_alone_is_told_from_one_of_pickles(snapshot: Path, tmp_path: Path) -> None:
    as_half(snapshot)
    for weights in snapshot.glob("unet/*.safetensors"):
        weights.unlink()
    with pytest.raises(ModelError, match=r"plain .safetensors in .*\(weights there: diffusion_pytorch_model.fp16"):
        load_model(resolve_model("o/base", "a" * 40, tmp_path))
    for weights in list(snapshot.rglob("*.fp16.safetensors")):
        weights.unlink()  # as it is fetched
    with pytest.raises(ModelError, match=r"\(weights there: none; of the hub neither other precisions nor pickles are"):
        load_model(resolve_model("o/base", "a" * 40, tmp_path))


@pytest.mark.parametrize("said", [None, False, True])
def test_an_autoencoder_is_kept_in_float32_where_its_file_says_that_half_precision_is_too_coarse(
    copy: Path, said: bool | None
) -> None:
    """diffusers adds force_upcast: true to a file that does not say it, as that of SD1.5."""
    path = copy / "vae/config.json"
    config = json.loads(path.read_text())
    del config["force_upcast"]
    path.write_text(json.dumps(config if said is None else config | {"force_upcast": said}))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        model = load_model(copy, dtype)
        assert model.vae.dtype == (torch.float32 if said else dtype)
        assert model.unet.dtype == dtype


@pytest.mark.fault(27)
@pytest.mark.threat(14)
def test_a_hub_model_needs_a_commit_and_an_absent_one_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"base\.revision: should be the 40-digit commit"):
        resolve_model("owner/name", None, tmp_path)
    with pytest.raises(ModelError, match=r"hf download owner/name --revision a{40}"):
        resolve_model("owner/name", "a" * 40, tmp_path)
    with pytest.raises(ModelError, match="is no folder in"):
        resolve_model("data/base/none", None, tmp_path)


def test_trained_parts_stand_in_for_those_of_the_base(tiny_model_folder: Path, tmp_path: Path) -> None:
    model = load_model(tiny_model_folder)
    with torch.no_grad():
        model.unet.conv_in.bias.fill_(3.0)
    save_parts(model, tmp_path / "trained", torch.float16, ["unet"])
    assert [path.name for path in (tmp_path / "trained").iterdir()] == ["unet"]
    again = load_model(tiny_model_folder, trained=tmp_path / "trained")
    assert torch.equal(again.unet.conv_in.bias, torch.full_like(again.unet.conv_in.bias, 3.0))
    assert again.unet.dtype == torch.float32


def test_a_trained_text_encoder_has_the_names_of_its_base(tiny_model_folder: Path, tmp_path: Path) -> None:
    """Other programs look for the names of the hub, which differ from those in memory."""
    base = Path(shutil.copytree(tiny_model_folder, tmp_path / "base"))
    file = base / "text_encoder/model.safetensors"
    plain = {name.removeprefix("text_model."): weight for name, weight in load_file(file).items()}
    save_file({f"text_model.{name}": weight for name, weight in plain.items()}, file, metadata={"format": "pt"})
    model = load_model(base)
    save_parts(model, tmp_path / "trained", torch.float16, ["unet", "text_encoder"])
    saved = load_file(tmp_path / "trained/text_encoder/model.safetensors")
    assert set(saved) == set(load_file(file))
    assert {weight.dtype for weight in saved.values()} == {torch.float16}


def test_the_same_weights_in_another_precision_do_not_count(copy: Path, tmp_path: Path) -> None:
    before = model_hash(copy)
    weights = copy / "unet/diffusion_pytorch_model.safetensors"
    shutil.copy(weights, weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert model_hash(copy) == before
    (tmp_path / "export").mkdir()
    write_pipeline(copy, tmp_path / "nothing", tmp_path / "export", torch.float16)
    assert not list(tmp_path.glob("export/unet/*fp16*"))


@pytest.mark.threat(14)
def test_a_folder_outside_of_data_base_is_refused(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not in data/base"):
        resolve_model(str(copy), None, tmp_path / "project")


def link_a_base(root: Path, outside: Path) -> str:
    (root / "data/base/linked").symlink_to(outside)
    return "data/base/linked"


def link_a_part(root: Path, outside: Path) -> str:
    shutil.copytree(outside, root / "data/base/whole")
    shutil.rmtree(root / "data/base/whole/unet")
    (root / "data/base/whole/unet").symlink_to(outside / "unet")
    return "data/base/whole"


def link_a_folder_above(root: Path, outside: Path) -> str:
    (root / "data/base/family").symlink_to(outside.parent)
    return f"data/base/family/{outside.name}"


def lead_outside(root: Path, outside: Path) -> str:
    return f"data/base/../../../{outside.name}"


@pytest.mark.threat(14)
@pytest.mark.parametrize(
    ("place", "told"),
    [
        (
            link_a_base,
            r"data/base/linked is a link to a folder, behind which DVC sees no change; move or copy it there",
        ),
        (link_a_part, r"data/base/whole/unet is a link to a folder"),
        (link_a_folder_above, r"data/base/family is a link to a folder"),
        (lead_outside, r"\.\./\.\./\.\./copy is not in data/base, where its changes would be seen"),
    ],
)
def test_a_base_whose_changes_dvc_would_not_see_is_refused(
    copy: Path, tmp_path: Path, place: Callable[[Path, Path], str], told: str
) -> None:
    root = tmp_path / "project"
    (root / "data/base").mkdir(parents=True)
    with pytest.raises(ModelError, match=told):
        locate(place(root, copy), None, root)


def test_a_link_that_stays_in_data_base_is_refused_too_for_it_may_lead_elsewhere_tomorrow(
    copy: Path, tmp_path: Path
) -> None:
    shutil.move(copy, tmp_path / "project/data/base/tiny")
    (tmp_path / "project/data/base/current").symlink_to("tiny")
    with pytest.raises(ModelError, match="data/base/current is a link to a folder"):
        locate("data/base/current", None, tmp_path / "project")


def test_data_base_itself_may_be_a_link_which_dvc_follows(copy: Path, tmp_path: Path) -> None:
    root = tmp_path / "project"
    (root / "data").mkdir(parents=True)
    (root / "data/base").symlink_to(copy.parent)
    assert locate(f"data/base/{copy.name}", None, root) == root / "data/base" / copy.name


def test_the_written_pipeline_is_one_that_diffusers_loads(tiny_model_folder: Path, tmp_path: Path) -> None:
    model = load_model(tiny_model_folder)
    save_parts(model, tmp_path / "trained", torch.float32, ["unet", "text_encoder"])
    (tmp_path / "export").mkdir()
    write_pipeline(tiny_model_folder, tmp_path / "trained", tmp_path / "export", torch.float16)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "export", use_safetensors=True)
    assert pipeline.safety_checker is None
    for name, weight in model.unet.state_dict().items():
        assert torch.equal(pipeline.unet.state_dict()[name], weight)
