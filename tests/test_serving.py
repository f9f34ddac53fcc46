import ast
import importlib.util
import io
import json
import shutil
import sys
from datetime import date, timedelta
from importlib.metadata import packages_distributions
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from PIL import Image

from dreambooth import registry, serving
from dreambooth.errors import ConsentError
from dreambooth.folders import TornFolderError, content_hash, new_folder
from dreambooth.images import read_provenance
from dreambooth.models import load_model
from dreambooth.sampling import SamplerSettings, draw
from dreambooth.serving import PictureModel
from dreambooth.versions import predict

DEFAULTS = {
    "subject": "biscuit", "identifier": "sks", "class_noun": "dog", "instance_prompt": "a photo of sks dog",
    "resolution": 32, "scheduler": "ddim", "num_inference_steps": 2, "guidance_scale": 5.0, "negative_prompt": "",
}  # fmt: skip


@pytest.fixture(scope="module")
def export(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "biscuit"
    with new_folder(folder, {}) as target:
        shutil.copytree(tiny_model_folder, target, dirs_exist_ok=True)
        (target / "generation.json").write_text(json.dumps(DEFAULTS))
    return folder


@pytest.fixture(scope="module")
def model(export: Path) -> PictureModel:
    return loaded(export)


def loaded(folder: Path) -> PictureModel:
    model = PictureModel()
    model.load_context(SimpleNamespace(artifacts={"pipeline": str(folder)}))
    return model


def pixels(png: bytes) -> bytes:
    return Image.open(io.BytesIO(png)).tobytes()


def test_it_draws_what_the_sampler_draws(model: PictureModel, export: Path) -> None:
    settings = SamplerSettings("ddim", 2, 5.0, 32)
    (expected,) = draw(load_model(export), ["a dog"], [7], settings)
    (drawn,) = model.predict(pd.DataFrame({"prompt": ["a dog"]}), params={"seed": 7})
    assert pixels(drawn) == expected.tobytes()


def test_prompt_i_is_drawn_with_seed_plus_i_whatever_stands_beside_it(model: PictureModel) -> None:
    three = model.predict(pd.DataFrame({"prompt": ["a cat", "a dog", "a dog"]}), params={"seed": 6})
    assert [three[1]] == model.predict(pd.DataFrame({"prompt": ["a dog"]}), params={"seed": 7})
    assert pixels(three[1]) != pixels(three[2])


@pytest.mark.parametrize(
    "model_input",
    [
        {"prompt": ["a dog", "a cat"]},
        {"prompt": np.array(["a dog", "a cat"])},
        pd.DataFrame({"prompt": ["a dog", "a cat"]}),
        pd.DataFrame({"prompt": [["a dog", "a cat"]]}),
        [{"prompt": "a dog"}, {"prompt": "a cat"}],
        ["a dog", "a cat"],
    ],
    ids=["lists", "arrays", "rows", "a list in a row", "dictionaries", "sentences"],
)
def test_prompts_may_come_in_many_shapes(model: PictureModel, model_input: object) -> None:
    expected = [*model.predict(["a dog"], {"seed": 1}), *model.predict(["a cat"], {"seed": 2})]
    assert model.predict(model_input, {"seed": 1}) == expected


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 1},
        {"num_inference_steps": 3},
        {"guidance_scale": 2.0},
        {"scheduler": "euler"},
        {"resolution": 40},
        {"negative_prompt": "blur"},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_every_parameter_counts(model: PictureModel, changed: dict[str, object]) -> None:
    (other,), (usual,) = model.predict(["a dog"], changed), model.predict(["a dog"])
    assert pixels(other) != pixels(usual)
    assert model.predict(["a dog"], {name: None for name in changed}) == model.predict(["a dog"])


def test_a_picture_says_how_it_was_made(model: PictureModel, export: Path) -> None:
    (png,) = model.predict(pd.DataFrame({"prompt": ["a dog"], "negative_prompt": ["blur"]}), {"seed": 3})
    about = read_provenance(png)
    assert about["export_hash"] == content_hash(export)
    assert (about["prompt"], about["negative_prompt"], about["seed"]) == ("a dog", "blur", 3)
    settings = {name: about[name] for name in ("num_inference_steps", "guidance_scale", "scheduler", "resolution")}
    rows = pd.DataFrame({"prompt": [about["prompt"]], "negative_prompt": [about["negative_prompt"]]})
    assert model.predict(rows, settings | {"seed": about["seed"]}) == [png]


def test_pictures_of_a_batch_are_those_drawn_alone_but_for_rounding(model: PictureModel) -> None:
    prompts = ["a dog", "a cat", "a dog in space"]
    alone, together = (model.predict(prompts, {"seed": 1, "batch_size": size}) for size in (1, 3))
    for one, other in zip(alone, together, strict=True):
        a, b = (np.frombuffer(pixels(png), np.uint8).astype(int) for png in (one, other))
        assert abs(a - b).max() <= 2


def test_a_row_may_have_its_own_negative_prompt(model: PictureModel) -> None:
    rows = pd.DataFrame({"prompt": ["a dog", "a dog"], "negative_prompt": ["blur", None]})
    first, second = model.predict(rows)
    assert [first] == model.predict(["a dog"], {"negative_prompt": "blur"})
    assert [second] == model.predict(["a dog"], {"seed": 1})


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"seed": -1}, "seed: should be in"),
        ({"num_inference_steps": 10**9}, r"num_inference_steps: should be 1 to 999 \(got 1000000000\)"),
        ({"guidance_scale": float("nan")}, "guidance_scale: should be 0 to 50"),
        ({"resolution": 33}, "resolution: should be a multiple of 8"),
        ({"resolution": 100_000}, "resolution: should be 32 to 2048"),
        ({"batch_size": 65}, "batch_size: should be 1 to 64"),
        ({"scheduler": "heun"}, r"scheduler: should be one of dpmsolver\+\+, ddim, pndm, euler \(got 'heun'\)"),
    ],
)
def test_absurd_parameters_are_refused(model: PictureModel, params: dict[str, object], message: str) -> None:
    with pytest.raises(MlflowException, match=message):
        model.predict(["a dog"], params)


def test_a_solver_that_cannot_draw_with_the_base_is_refused(
    model: PictureModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(model._model.scheduler_config, "rescale_betas_zero_snr", True)
    with pytest.raises(MlflowException, match="scheduler pndm would draw on another noise schedule"):
        model.predict(["a dog"], {"scheduler": "pndm"})


@pytest.mark.threat(24)
@pytest.mark.parametrize(
    ("pictures", "params"),
    [
        (64, {"num_inference_steps": 101}),
        (7, {"num_inference_steps": 999}),
        (1, {"num_inference_steps": 999, "resolution": 96}),
        (2, {"num_inference_steps": 1, "resolution": 2048}),
    ],
)
def test_a_call_whose_bounds_are_kept_but_whose_work_is_days_is_refused_before_it_begins(
    model: PictureModel, pictures: int, params: dict[str, int]
) -> None:
    with pytest.raises(MlflowException, match=r"at the 32 px of this model, and one call may ask for 6,400; lower"):
        model.predict(["a dog"] * pictures, params)


@pytest.mark.parametrize(
    ("pictures", "params"),
    [
        (64, {"num_inference_steps": 100}),
        (4, {"num_inference_steps": 999}),
        (64, {"num_inference_steps": 25, "resolution": 64}),
        (8, {"num_inference_steps": 50, "resolution": 128}),
    ],
)
def test_what_a_person_would_ask_for_is_drawn(
    model: PictureModel, monkeypatch: pytest.MonkeyPatch, pictures: int, params: dict[str, int]
) -> None:
    def blank(_: object, prompts: list[str], __: object, settings: SamplerSettings) -> list[Image.Image]:
        return [Image.new("RGB", (settings.resolution, settings.resolution))] * len(prompts)

    monkeypatch.setattr(serving, "draw", blank)
    assert len(model.predict(["a dog"] * pictures, params)) == pictures


@pytest.mark.parametrize("model_input", [[], ["a dog"] * 65, {"prompt": 3}, {"text": "a dog"}, [3]])
def test_what_is_no_prompt_is_refused(model: PictureModel, model_input: object) -> None:
    with pytest.raises(MlflowException, match="prompt: "):
        model.predict(model_input)


def test_a_damaged_export_is_not_loaded(export: Path, tmp_path: Path) -> None:
    copy = tmp_path / "biscuit"
    shutil.copytree(export, copy)
    (copy / "model_index.json").write_text("{}")
    with pytest.raises(TornFolderError, match=r"model_index\.json has 2 bytes"):
        loaded(copy)


@pytest.mark.threat(21)
def test_a_person_is_drawn_only_while_the_consent_lasts(export: Path, tmp_path: Path) -> None:
    today = date.today()

    def of_a_person(until: date) -> PictureModel:
        agreed = {"who": "file 12", "given": str(today - timedelta(days=9)), "purpose": "a poster", "until": str(until)}
        with new_folder(tmp_path / str(until) / "rex", {"consent": agreed}) as target:
            shutil.copytree(export, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
        return loaded(tmp_path / str(until) / "rex")

    assert len(of_a_person(today).predict(pd.DataFrame({"prompt": ["a dog"]}))) == 1
    with pytest.raises(MlflowException, match=r"the consent of biscuit holds from .*, today is") as refused:
        of_a_person(today - timedelta(days=1)).predict(pd.DataFrame({"prompt": ["a dog"]}))
    assert refused.value.get_http_status_code() == 403
    with pytest.raises(ConsentError, match="run the subject again"):
        predict(of_a_person(today - timedelta(days=1)), ["a dog"], {"seed": 0})


def test_the_signature_holds_the_defaults_of_the_export(export: Path) -> None:
    signature = serving.signature(export)
    defaults = {spec.name: spec.default for spec in signature.params.params}
    assert defaults == {name: (DEFAULTS | serving.CALL)[name] for name in serving.PARAM_TYPES}
    assert signature.inputs.required_input_names() == ["prompt"]


def test_run_under_another_name_it_hands_mlflow_a_model() -> None:
    import mlflow.models.model

    spec = importlib.util.spec_from_file_location("code_model", serving.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    handed = vars(mlflow.models.model)["__mlflow_model__"]
    assert type(handed) is module.PictureModel
    assert type(handed) is not PictureModel


def test_every_package_that_the_served_code_imports_is_pinned() -> None:
    """Follow the imports from serving.py through dreambooth, and look what of other packages they need."""
    folder = Path(serving.__file__).parent
    todo, seen, needed = ["serving"], set[str](), set[str]()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        if name.startswith("__"):  # __version__ is no module
            continue
        for node in ast.walk(ast.parse((folder / f"{name}.py").read_text())):
            if isinstance(node, ast.Import):
                needed |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                package, _, rest = node.module.partition(".")
                if package == "dreambooth":
                    todo += [rest] if rest else [alias.name for alias in node.names]
                else:
                    needed.add(package)
    pinned = {"huggingface_hub", *registry.SERVED_WITH}  # the hub comes with diffusers
    providers = packages_distributions()
    missing = [
        package
        for package in needed - sys.stdlib_module_names
        if not pinned & {package, *(provider.lower() for provider in providers[package])}
    ]
    assert not missing
