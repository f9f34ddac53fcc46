"""Every format of an export, loaded again by diffusers, draws the picture of the model that it was made from."""

import ast
import html
import json
import re
import shutil
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
import yaml
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from markdown_it import MarkdownIt
from test_layouts import picture
from test_lora_formats import ALPHA, TEXT_MODULES, UNET_MODULES, adapt
from test_methods import run
from tiny_pipelines import write_sd, write_sdxl
from tiny_project import REPOSITORY

from dreambooth.adapters import EMBEDDINGS_FILE, LORA_FILE, save_lora
from dreambooth.card import card
from dreambooth.consent import Consent
from dreambooth.errors import ExportError, ModelError, ParamsError
from dreambooth.export import a1111_embedding, generation_defaults, require_formats, write_export
from dreambooth.folders import sha256_of_file
from dreambooth.models import load_model, write_pipeline
from dreambooth.params import parse_params
from dreambooth.sampling import SCHEDULERS, SamplerSettings, draw
from dreambooth.weight_files import kohya_header, modelspec

METRICS: dict[str, Any] = {
    "identity": dict.fromkeys(("personalised", "base", "gain", "low", "high", "ceiling"), 0.5) | {"prompts": 6},
    "prompt": {"gain": -0.07, "low": -0.15, "high": 0.02, "prompts": 8}, "copying": {"rate": 0.0},
    "confidence": 0.95, "prompts": 6, "encoder": {"name": "e", "revision": "1"}, "photos": 5,
}  # fmt: skip
ONE_STEP = 1 / 255  # of a picture of 8 bits


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / request.param
    return write_sdxl(folder) if request.param == "sdxl" else write_sd(folder)


def kind_of(folder: Path) -> Any:
    return StableDiffusionXLPipeline if (folder / "text_encoder_2").is_dir() else StableDiffusionPipeline


def export(
    values: dict[str, Any],
    base: Path,
    trained: Path,
    folder: Path,
    formats: list[str],
    method: str = "full",
    **more: Any,
) -> Path:
    values["export"] |= {"formats": ["diffusers", *formats]} | more
    values["train"]["method"] = method
    folder.mkdir()
    write_export(folder, base, trained, "biscuit", parse_params(values), "b" * 64, METRICS, None, method, 5)
    return folder


def header(path: Path) -> dict[str, str]:
    with safetensors.safe_open(path, "pt") as file:
        return dict(file.metadata())


def train_lora(base: Path, folder: Path, dora: bool = False) -> np.ndarray:
    """Write a LoRA as the training does; return the picture of the model with it."""
    pipeline = kind_of(base).from_pretrained(base)
    torch.manual_seed(1)
    parts = (
        ("unet", "text_encoder", "text_encoder_2") if hasattr(pipeline, "text_encoder_2") else ("unet", "text_encoder")
    )
    modules = {part: getattr(pipeline, part) for part in parts}
    for part, module in modules.items():
        adapt(module, UNET_MODULES if part == "unet" else TEXT_MODULES, dora)
    folder.mkdir()
    save_lora(folder / LORA_FILE, modules, torch.float32)
    return picture(pipeline)


def loaded(base: Path, *files: Path, word: str = "sks") -> Any:
    """Load files of an export onto the base as a user of diffusers does."""
    pipeline = kind_of(base).from_pretrained(base, use_safetensors=True)
    for path in files:
        if path.parent.name != "embedding":
            pipeline.load_lora_weights(path.parent, weight_name=path.name)
        else:
            load_word(pipeline, path, word)
    return pipeline


def load_word(pipeline: Any, path: Path, word: str = "sks") -> None:
    if isinstance(pipeline, StableDiffusionPipeline):
        pipeline.load_textual_inversion(path, token=word)
        return
    pipeline.text_encoder_2.text_model.eos_token_id = pipeline.tokenizer_2.eos_token_id  # as the card says
    rows = safetensors.torch.load_file(path)
    for name, suffix in (("clip_l", ""), ("clip_g", "_2")):
        parts = {"text_encoder": f"text_encoder{suffix}", "tokenizer": f"tokenizer{suffix}"}
        more = {key: getattr(pipeline, part) for key, part in parts.items()}
        pipeline.load_textual_inversion(rows[name], token=word, **more)


def assert_equal_weights(one: Any, other: Any) -> None:
    for name, part in one.components.items():
        if isinstance(part, torch.nn.Module):
            ours, theirs = part.state_dict(), getattr(other, name).state_dict()
            assert ours.keys() == theirs.keys(), name
            assert all(torch.equal(ours[key], theirs[key]) for key in ours), name


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_format_draws_the_picture_of_the_evaluated_model(
    params_values: dict[str, Any], base: Path, tmp_path: Path, dtype: str
) -> None:
    """What has one precision is compared in it, see docs/decisions/0091; both sides are drawn in float32."""
    trained, precision = tmp_path / "trained", getattr(torch, dtype)
    how = {"method": "pivotal", "train_text_encoder": True, "learning_rate": 3e-2, "save_dtype": dtype}
    run(load_model(base, device="cpu"), trained, **how)
    params_values["train"]["save_dtype"] = dtype
    formats = ["single_file", "lora", "kohya", "embedding"]
    folder = export(params_values, base, trained, tmp_path / "out", formats, "pivotal", dtype=dtype)

    write_pipeline(base, trained, tmp_path / "evaluated", torch.float32)
    evaluated = picture(kind_of(base).from_pretrained(tmp_path / "evaluated"))
    assert np.abs(picture(kind_of(base).from_pretrained(base)) - evaluated).max() > 10 * ONE_STEP
    word = folder / "embedding/sks.safetensors"
    assert "LoRA and embedding were trained together" in (folder / "README.md").read_text()
    for lora in (folder / "lora" / LORA_FILE, folder / "kohya/biscuit.safetensors"):
        assert np.abs(picture(loaded(base, word, lora)) - evaluated).max() < ONE_STEP, lora

    whole = kind_of(base).from_pretrained(folder, dtype=precision).to(torch.float32)
    path = folder / "single_file/biscuit.safetensors"
    assert {tensor.dtype for tensor in safetensors.torch.load_file(path).values()} == {precision}
    single = kind_of(base).from_single_file(path, config=str(base), local_files_only=True).to(torch.float32)
    load_word(single, word)
    assert_equal_weights(single, whole)
    assert np.abs(picture(single) - picture(whole)).max() < ONE_STEP
    assert np.abs(picture(kind_of(base).from_pretrained(folder)) - evaluated).max() < ONE_STEP


def test_the_blocks_of_the_page_on_files_for_other_programs_draw_the_model_of_the_folder(
    params_values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, word = write_sd(tmp_path / "data/base/emoji64"), "<rex>"
    train_lora(base, tmp_path / "trained")
    vectors = {word: torch.randn(1, 16, generator=torch.Generator().manual_seed(3))}
    safetensors.torch.save_file(vectors, tmp_path / "trained" / EMBEDDINGS_FILE, {"token": word})
    params_values["subjects"] = {"rex": {"class_id": "dog", "identifier": word, "kind": "live"}}
    params_values["export"] |= {"formats": ["diffusers", "single_file", "lora", "kohya", "embedding"]}
    params_values["export"]["dtype"] = "float32"
    params_values["train"]["method"] = "pivotal"
    folder = tmp_path / "export/rex"
    folder.mkdir(parents=True)
    params = parse_params(params_values)
    write_export(folder, base, tmp_path / "trained", "rex", params, "b" * 64, METRICS, None, "pivotal", 5)

    monkeypatch.chdir(tmp_path)
    page = (REPOSITORY / "docs/recipes.md").read_text()
    single, parts = (run_block(block.partition("\n```")[0]) for block in page.split("```python\n")[1:])
    load_word(single, folder / "embedding/rex.safetensors", word)
    expected = picture(StableDiffusionPipeline.from_pretrained(folder), f"a photo of {word} dog")
    assert np.abs(picture(StableDiffusionPipeline.from_pretrained(base)) - expected).max() > 10 * ONE_STEP
    for pipeline in (single, parts):
        assert np.abs(picture(pipeline, f"a photo of {word} dog") - expected).max() < ONE_STEP


def run_block(block: str) -> Any:
    """Run a block of Python of a page; return its pipeline."""
    names: dict[str, Any] = {}
    exec(block, names)
    return names["pipeline"]


@pytest.mark.parametrize(
    ("changes", "marks"),
    [
        ({}, set()),
        ({"prediction_type": "v_prediction"}, {"v_pred"}),
        ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, {"v_pred", "ztsnr"}),
    ],
)
def test_a_single_file_of_sdxl_says_to_other_programs_what_it_predicts(
    params_values: dict[str, Any], tmp_path: Path, changes: dict[str, Any], marks: set[str]
) -> None:
    base = write_sdxl(tmp_path / "base")
    about = base / "scheduler/scheduler_config.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | changes))
    folder = export(params_values, base, tmp_path / "nothing", tmp_path / "out", ["single_file"], dtype="float32")
    path = folder / "single_file/biscuit.safetensors"
    found = safetensors.torch.load_file(path)
    assert {name for name in found if "." not in name} == marks
    assert all(found[name].numel() == 0 for name in marks)
    whole = StableDiffusionXLPipeline.from_pretrained(folder)
    assert_equal_weights(
        StableDiffusionXLPipeline.from_single_file(path, config=str(folder), local_files_only=True), whole
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_folder_of_a_full_training_is_the_evaluated_model_to_the_last_bit(
    params_values: dict[str, Any], base: Path, tmp_path: Path, dtype: str
) -> None:
    trained = tmp_path / "trained"
    run(load_model(base, device="cpu"), trained, method="full", train_text_encoder=True, save_dtype=dtype)
    params_values["train"]["save_dtype"] = dtype
    folder = export(params_values, base, trained, tmp_path / "out", ["single_file"], dtype=dtype)
    evaluated, whole = load_model(base, device="cpu", trained=trained), kind_of(base).from_pretrained(folder)
    for name in ("unet", "vae", *evaluated.encoders):
        ours, theirs = getattr(evaluated, name).state_dict(), getattr(whole, name).state_dict()
        assert all(torch.equal(ours[key], theirs[key].float()) for key in ours), name


def test_both_files_of_a_lora_and_the_folder_draw_the_trained_picture(
    params_values: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    expected = train_lora(base, tmp_path / "trained")
    arguments = (params_values, base, tmp_path / "trained", tmp_path / "out", ["lora", "kohya"], "lora")
    folder = export(*arguments, dtype="float32")
    for path in (folder / "lora" / LORA_FILE, folder / "kohya/biscuit.safetensors"):
        pipeline = kind_of(base).from_pretrained(base)
        pipeline.load_lora_weights(path.parent, weight_name=path.name)
        assert np.abs(picture(pipeline) - expected).max() < ONE_STEP, path
    merged = kind_of(base).from_pretrained(folder)
    assert np.abs(picture(merged) - expected).max() < ONE_STEP
    about = header(folder / "kohya/biscuit.safetensors")
    name = "stable-diffusion-xl-v1-base" if kind_of(base) is StableDiffusionXLPipeline else "stable-diffusion-v1"
    assert about["modelspec.architecture"] == f"{name}/lora"
    assert about["modelspec.trigger_phrase"] == "sks dog"
    assert (about["ss_network_dim"], about["ss_network_alpha"]) == ("4", f"{ALPHA:.1f}")
    assert about["ss_network_module"] == "networks.lora"


def test_a_dora_is_drawn_by_diffusers_from_its_lora_and_in_the_format_of_kohya_it_is_refused(
    params_values: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    expected = train_lora(base, tmp_path / "trained", dora=True)
    params_values["train"]["use_dora"] = True
    arguments = (params_values, base, tmp_path / "trained", tmp_path / "out", ["lora"], "lora")
    folder = export(*arguments, dtype="float32")
    assert np.abs(picture(loaded(base, folder / "lora" / LORA_FILE)) - expected).max() < ONE_STEP
    assert '`.load_lora_weights("export/biscuit/lora")`' in (folder / "README.md").read_text()
    params_values["export"]["formats"].append("kohya")
    with pytest.raises(ParamsError, match=r"kohya with train\.use_dora is another model in ComfyUI and in A1111"):
        parse_params(params_values)
    params_values["train"]["use_dora"] = False  # changed after the training
    arguments = (params_values, base, tmp_path / "trained", tmp_path / "again", ["kohya"], "lora")
    with pytest.raises(ExportError, match="kohya holds no DoRA, and this training made one"):
        export(*arguments, dtype="float32")


def test_a_single_file_of_a_new_word_has_the_vocabulary_of_the_base_and_the_word_beside_it(
    params_values: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    run(load_model(base, device="cpu"), tmp_path / "trained", method="textual_inversion", max_train_steps=1)
    arguments = (params_values, base, tmp_path / "trained", tmp_path / "out", ["single_file"], "textual_inversion")
    folder = export(*arguments, dtype="float32")
    weights = safetensors.torch.load_file(folder / "single_file/biscuit.safetensors")
    assert {len(tensor) for name, tensor in weights.items() if "token_embedding" in name} == {514}
    assert (folder / "embedding/sks.safetensors").is_file()
    card = (folder / "README.md").read_text()
    assert 'config="data/base/tiny")`, ComfyUI, A1111; it has the vocabulary of the base' in card
    assert ("eos_token_id" in card) == (kind_of(base) is StableDiffusionXLPipeline)
    assert "trained together" not in card
    assert "| prior.kind | none |" in card


@pytest.mark.parametrize(
    ("class_images", "text", "expected"),
    [(7, True, ("7", "0.5", "0.002")), (0, False, ("0", "0.0", "0.0"))],
)
def test_the_header_of_kohya_says_what_was_trained_on_and_how_fast(
    params_values: dict[str, Any], class_images: int, text: bool, expected: tuple[str, str, str]
) -> None:
    params_values["train"] |= {"method": "lora", "prior_loss_weight": 0.5, "max_train_steps": None}
    params_values["train"] |= {"train_text_encoder": text, "text_encoder_learning_rate": 2e-3}
    params = parse_params(params_values)
    about = kohya_header("sd1", 4, 4.0, "biscuit", params, 5, class_images, {"prediction_type": "epsilon"})
    assert tuple(about[f"ss_{key}"] for key in ("num_reg_images", "prior_loss_weight", "text_encoder_lr")) == expected
    assert about["ss_unet_lr"] == about["ss_learning_rate"]
    assert about["ss_optimizer"].endswith("AdamW")
    assert about["ss_max_train_steps"] == "500"  # 100 a photo
    assert about["ss_base_model_version"] == "sd_v1"


def test_headers_tell_the_two_predictions_of_sd2_apart(params_values: dict[str, Any]) -> None:
    params = parse_params(params_values)
    for kind, base, name in (("epsilon", "sd_v2", "v2-512"), ("v", "sd_v2_v", "v2-768-v")):
        about = {"prediction_type": kind}
        assert kohya_header("sd2", 4, 4.0, "biscuit", params, 5, 0, about)["ss_base_model_version"] == base
        architecture = modelspec("lora", "sd2", "biscuit", params, about)["modelspec.architecture"]
        assert architecture == f"stable-diffusion-{name}/lora"


def test_the_embedding_is_read_by_diffusers_under_any_word(params_values: dict[str, Any], tmp_path: Path) -> None:
    base, word = write_sd(tmp_path / "base"), "<rex>"
    params_values["subjects"]["biscuit"]["identifier"] = word
    (tmp_path / "trained").mkdir()
    torch.manual_seed(3)
    vectors = torch.randn(1, 16)
    safetensors.torch.save_file({word: vectors}, tmp_path / "trained" / EMBEDDINGS_FILE, {"token": word})
    arguments = (params_values, base, tmp_path / "trained", tmp_path / "out", ["embedding"], "textual_inversion")
    folder = export(*arguments, dtype="float32")
    path = folder / "embedding/rex.safetensors"
    assert list(safetensors.torch.load_file(path)) == ["emb_params"]
    assert header(path)["modelspec.architecture"] == "stable-diffusion-v1/textual-inversion"
    assert header(path)["modelspec.trigger_phrase"] == "rex dog"  # there the word is the name of the file
    pipeline = StableDiffusionPipeline.from_pretrained(base)
    pipeline.load_textual_inversion(path, token="sks")
    number = pipeline.tokenizer.convert_tokens_to_ids("sks")
    assert torch.equal(pipeline.text_encoder.get_input_embeddings().weight[number], vectors[0])


def test_the_embeddings_of_sdxl_keep_the_names_of_both_encoders() -> None:
    weights = {"clip_l": torch.zeros(1, 16), "clip_g": torch.zeros(32)}
    assert {name: tuple(tensor.shape) for name, tensor in a1111_embedding(weights).items()} == {
        "clip_l": (1, 16),
        "clip_g": (1, 32),
    }
    with pytest.raises(ModelError, match="holds a, b"):
        a1111_embedding({"a": torch.zeros(1), "b": torch.zeros(1)})


def test_the_same_training_gives_the_same_bytes(params_values: dict[str, Any], tmp_path: Path) -> None:
    base = write_sd(tmp_path / "base")
    train_lora(base, tmp_path / "trained")
    hashes = []
    for name in ("one", "two", "three"):
        formats = ["single_file", "lora", "kohya"]
        folder = export(params_values, base, tmp_path / "trained", tmp_path / name, formats, "lora")
        hashes.append({path.relative_to(folder): sha256_of_file(path) for path in folder.rglob("*") if path.is_file()})
    assert hashes[0] == hashes[1] == hashes[2]


def test_the_card_names_files_hashes_parameters_scores_and_licence(
    params_values: dict[str, Any], tmp_path: Path
) -> None:
    base = write_sd(tmp_path / "base")
    more = {"license": "creativeml-openrail-m"}
    folder = export(params_values, base, tmp_path / "nothing", tmp_path / "out", ["single_file"], **more)
    card = (folder / "README.md").read_text()
    path = folder / "single_file/biscuit.safetensors"
    assert (
        f"| single_file/biscuit.safetensors | {sha256_of_file(path)} | `StableDiffusionPipeline.from_single_file("
        in card
    )
    assert 'config="export/biscuit")`' in card
    assert 'license: "creativeml-openrail-m"\n' in card
    assert f"| learning_rate | {params_values['train']['learning_rate']} |" in card
    assert "| base.resolution | 32 |" in card
    assert "| prior.kind | images |\n| class images | 5 |" in card
    assert "| prompt fidelity against the base, over 8 prompts | -0.070 [-0.150, +0.020] |" in card
    assert 'instance_prompt: "a photo of sks dog"' in card


@pytest.mark.threat(18)
@pytest.mark.parametrize("identifier", ['x"y', '");exit(1)#', "`{x}`", "</code>|<b>", "\\", "[a](b)", "EXPORT"])
def test_a_card_holds_names_as_names_in_its_front_matter_its_snippet_and_its_text(
    params_values: dict[str, Any], tmp_path: Path, identifier: str
) -> None:
    noun, base = "<script>alert(1)</script>: *dog* `", 'data/base/a `b` | c"d'
    params_values["classes"]["dog"]["class_noun"] = noun
    params_values["subjects"]["biscuit"]["identifier"] = identifier
    params_values["base"] |= {"pretrained_model_name_or_path": base, "revision": "a" * 40}
    params_values["export"]["license"] = 'other: "x" <b>'
    params, folder = parse_params(params_values), tmp_path / "single_file"
    folder.mkdir()
    (folder / "biscuit.safetensors").touch()
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    consent = Consent(who="<i>me</i>", given=date(2026, 1, 1), purpose="[x](http://x)", until=date(2027, 1, 1))
    defaults = generation_defaults(params, "biscuit")
    text = card(tmp_path, "biscuit", params, "b" * 64, METRICS, defaults, consent, "textual_inversion", 5)
    _, front, body = text.split("---\n", 2)
    told = yaml.safe_load(front)
    assert (told["instance_prompt"], told["base_model"]) == (f"a photo of {identifier} {noun}", base)
    assert told["license"] == 'other: "x" <b>'
    loading, _, drawing = ast.parse(snippet_of(body)).body[-3:]
    assert isinstance(loading, ast.Assign)
    assert isinstance(drawing, ast.Expr)
    assert isinstance(drawing.value, ast.Call)
    assert ast.literal_eval(drawing.value.args[0]) == f"a photo of {identifier} {noun}"
    page = MarkdownIt("commonmark").enable("table").render(body)
    ours = r"</?(?:h1|p|pre|code(?: class=\"language-python\")?|table|thead|tbody|tr|t[hd])>"
    assert re.findall(r"<[^>]*>", re.sub(ours, "", page)) == []
    assert page.count("<code") == page.count("</code>")
    row = next(line for line in page.splitlines() if "from_single_file" in line)
    assert html.escape(f"config={json.dumps(base)})") in row
    assert f"<h1>biscuit: a {html.escape(noun)} called {html.escape(identifier)}</h1>" in page
    assert "revision " + "a" * 40 in page


def snippet_of(card: str) -> str:
    return card.partition("```python\n")[2].partition("\n```")[0]


def test_the_snippet_of_a_card_draws_the_picture_that_the_evaluation_draws(
    params_values: dict[str, Any], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base has the solver of SD1.5 in its files, which say no spacing, as those on the hub."""
    pndm = {
        "_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "clip_sample": False, "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True,
        "steps_offset": 1,
    }  # fmt: skip
    base = Path(shutil.copytree(base, tmp_path / "base"))
    (base / "scheduler/scheduler_config.json").write_text(json.dumps(pndm))
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", "PNDMScheduler"]}))
    monkeypatch.chdir(tmp_path)
    for scheduler in SCHEDULERS:
        params_values["evaluate"] |= {"scheduler": scheduler, "num_inference_steps": 4, "guidance_scale": 3.0}
        (tmp_path / "export").mkdir()
        export(params_values, base, tmp_path / "nothing", tmp_path / "export/biscuit", [])
        *before, last = ast.parse(snippet_of((tmp_path / "export/biscuit/README.md").read_text())).body
        names: dict[str, Any] = {}
        exec(compile(ast.Module(before, []), "card", "exec"), names)
        torch.manual_seed(1)
        (drawn,) = eval(ast.unparse(last), names).images
        settings = SamplerSettings(scheduler, 4, 3.0, 32)
        (wanted,) = draw(load_model(base, device="cpu"), ["a photo of sks dog"], [1], settings)
        assert np.abs(np.asarray(drawn).astype(int) - np.asarray(wanted)).max() <= 1, scheduler
        shutil.rmtree(tmp_path / "export")


@pytest.mark.parametrize(("dtype", "place"), [("float32", ""), ("float16", '.to("cuda")'), ("bfloat16", '.to("cuda")')])
def test_the_snippet_of_a_card_has_the_precision_of_the_evaluation(
    params_values: dict[str, Any], tmp_path: Path, dtype: str, place: str
) -> None:
    params_values["base"]["inference_dtype"] = dtype
    folder = export(params_values, write_sd(tmp_path / "base"), tmp_path / "nothing", tmp_path / "out", [])
    assert f'from_pretrained("export/biscuit", dtype=torch.{dtype}){place}\n' in (folder / "README.md").read_text()


def test_a_format_that_the_method_does_not_fill_is_refused_before_anything_runs(params_values: dict[str, Any]) -> None:
    params_values["export"]["formats"] = ["diffusers", "kohya"]
    with pytest.raises(
        ParamsError, match=r"kohya holds what train\.method lora or pivotal makes, and the method is full"
    ):
        parse_params(params_values)


def test_a_format_that_an_older_training_does_not_fill_is_refused(params_values: dict[str, Any]) -> None:
    params_values["train"]["method"] = "lora"
    params_values["export"]["formats"] = ["diffusers", "kohya"]
    with pytest.raises(ExportError, match=r"kohya holds .* the method is full; take it out"):
        require_formats(parse_params(params_values), "full")


def test_the_folder_of_diffusers_is_always_part_of_an_export(params_values: dict[str, Any]) -> None:
    params_values["export"]["formats"] = ["single_file"]
    with pytest.raises(ParamsError, match=r"export\.formats: .*should hold diffusers"):
        parse_params(params_values)


def test_the_header_is_json_in_order(params_values: dict[str, Any], tmp_path: Path) -> None:
    base = write_sd(tmp_path / "base")
    folder = export(params_values, base, tmp_path / "nothing", tmp_path / "out", ["single_file"])
    with (folder / "single_file/biscuit.safetensors").open("rb") as file:
        content = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert list(content["__metadata__"]) == sorted(content["__metadata__"])
    assert content["__metadata__"]["modelspec.sai_model_spec"] == "1.0.0"
