"""params.yaml: read once, strictly, and refused with every fault at once."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_project import REPOSITORY

from dreambooth.errors import ParamsError, SubjectError
from dreambooth.params import Params, check_id, load_params, parse_params


@pytest.fixture
def values() -> dict[str, Any]:
    return yaml.safe_load((REPOSITORY / "params.yaml").read_text())


def problems_of(values: dict[str, Any]) -> list[str]:
    with pytest.raises(ParamsError) as refused:
        parse_params(values)
    return list(refused.value.problems)


def test_the_file_of_the_repository_is_accepted() -> None:
    assert load_params(REPOSITORY / "params.yaml").train.prior_loss_weight >= 0


def test_parameters_are_frozen(values: dict[str, Any]) -> None:
    params = parse_params(values)
    with pytest.raises(ValueError, match="frozen"):
        params.train.seed = 1  # type: ignore[misc]


def test_every_fault_is_named_at_once_with_its_path(values: dict[str, Any]) -> None:
    values["base"]["resolution"] = 65
    values["prior"]["num_class_images"] = -1
    values["train"]["adam_beta1"] = float("nan")
    del values["evaluate"]["seeds"]
    paths = [problem.split(": ")[1] for problem in problems_of(values)]
    assert paths == ["base.resolution", "prior.num_class_images", "train.adam_beta1", "evaluate.seeds"]


def with_learning_rate(text: str, folder: Path) -> Path:
    before = (REPOSITORY / "params.yaml").read_text()
    start = before.index("learning_rate:")
    line = before[start : before.index("\n", start)]
    (folder / "params.yaml").write_text(before.replace(line, f"learning_rate: {text}"))
    return folder / "params.yaml"


@pytest.mark.parametrize("text", ["5e-6", "5.0e-6", "0.000005", "5E-06"])
def test_a_number_is_a_number_however_it_is_written(tmp_path: Path, text: str) -> None:
    assert load_params(with_learning_rate(text, tmp_path)).train.learning_rate == 5e-6


def test_a_number_in_quotes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"train\.learning_rate: should be a number .*'5e-6'; drop the quotes"):
        load_params(with_learning_rate("'5e-6'", tmp_path))


def test_no_is_a_word(tmp_path: Path) -> None:
    text = (REPOSITORY / "params.yaml").read_text().replace('mixed_precision: "no"', "mixed_precision: no")
    (tmp_path / "params.yaml").write_text(text)
    assert load_params(tmp_path / "params.yaml").train.mixed_precision == "no"


@pytest.mark.parametrize(
    ("section", "key", "meant"),
    [("train", "lerning_rate", "learning_rate"), ("prior", "num_class_image", "num_class_images")],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(
    values: dict[str, Any], section: str, key: str, meant: str
) -> None:
    values[section][key] = 1
    assert problems_of(values) == [f"params.yaml: {section}.{key}: unknown key; did you mean {meant}?"]


def test_an_unknown_key_is_refused_at_the_top_and_inside_a_subject(values: dict[str, Any]) -> None:
    values["trian"] = {}
    values["subjects"]["biscuit"]["classid"] = "dog"
    assert [problem.split(": ", 1)[1] for problem in problems_of(values)] == [
        "subjects.biscuit.classid: unknown key; did you mean class_id?",
        "trian: unknown key; did you mean train?",
    ]


def test_a_subject_of_an_unknown_class_is_refused(values: dict[str, Any]) -> None:
    values["subjects"]["biscuit"]["class_id"] = "dgo"
    assert problems_of(values) == [
        "params.yaml: subjects.biscuit.class_id: there is no class 'dgo'; did you mean 'dog'?"
    ]


def test_an_identifier_that_is_the_class_noun_is_refused(values: dict[str, Any]) -> None:
    values["subjects"]["biscuit"]["identifier"] = "Dog"
    assert "subjects.biscuit.identifier" in problems_of(values)[0]


@pytest.mark.parametrize("bad", ["../../etc", "/etc", "", "-x", "a b", "Ä", "a" * 42, "dog; touch X #"])
def test_an_id_that_could_be_a_path_or_a_command_is_refused(bad: str, values: dict[str, Any]) -> None:
    with pytest.raises(SubjectError):
        check_id(bad)
    values["subjects"][bad] = values["subjects"]["biscuit"]
    assert problems_of(values)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: {seed: 1, seed: 2}", 'duplicate key "seed"'),
        ("a: &x [1]\nb: *x", "aliases"),
        ("a: !!python/object/apply:os.system ['true']", "cannot be read"),
        ("- 1", "should be a map"),
        ("a: [", "cannot be read"),
        ("a: {{sks}}", "unhashable key"),
        ("a: 2024-13-45", "cannot be read"),
        ("[" * 10_000, "cannot be read"),
    ],
)
def test_yaml_that_hides_what_it_does_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(ParamsError, match=said):
        load_params(tmp_path / "params.yaml")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match="does not exist"):
        load_params(tmp_path / "params.yaml")


def test_an_unknown_subject_is_refused_with_the_known_ones(values: dict[str, Any]) -> None:
    with pytest.raises(SubjectError, match="did you mean 'biscuit'"):
        parse_params(values).subject("biscit")


def test_every_parameter_says_what_it_is() -> None:
    undocumented = [
        f"{section.__name__}.{name}"
        for section in (field.annotation for field in Params.model_fields.values())
        if isinstance(section, type) and hasattr(section, "model_fields")
        for name, field in section.model_fields.items()
        if not field.description
    ]
    assert undocumented == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"evaluation_steps": None, "early_stopping_patience": 2},
            "train.early_stopping_patience: needs train.evaluation_steps",
        ),
        (
            {"evaluation_steps": None, "load_best_model_at_end": True},
            "train.load_best_model_at_end: needs train.evaluation_steps",
        ),
        (
            {"load_best_model_at_end": True, "evaluation_steps": 5, "checkpointing_steps": None},
            "train.load_best_model_at_end: needs checkpoints",
        ),
        ({"preview_steps": 5, "preview_prompts": []}, "train.preview_prompts: empty"),
        ({"ema_decay": 0.9, "load_best_model_at_end": True, "evaluation_steps": 5}, "train.ema_decay: replaces"),
        ({"optimizer": "prodigy", "embedding_learning_rate": 0.5}, "train.optimizer: prodigy has one rate"),
        ({"gradient_checkpointing": "sometimes"}, "train.gradient_checkpointing"),
        ({"method": "hypernetwork"}, "train.method: should be 'full', 'lora', 'textual_inversion' or 'pivotal'"),
        ({"preview_prompts": ["a dog"]}, "train.preview_prompts.0: should hold {}"),
    ],
)
def test_what_cannot_work_together_is_refused(values: dict[str, Any], changes: dict[str, Any], said: str) -> None:
    values["train"] |= changes
    assert said in problems_of(values)[0]
