"""params.yaml: read once, strictly, and refused with every fault at once."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_project import REPOSITORY

from dreambooth.errors import ParamsError, SubjectError
from dreambooth.identifiers import COMMON, identifier_remarks, remarks_by_tokenizer
from dreambooth.params import MAX_BYTES, Params, check_id, describe, load_params, parse_params

TOKENIZER = REPOSITORY / "data/base/emoji64/tokenizer"


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


@pytest.mark.fault(13)
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


@pytest.mark.fault(13)
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
@pytest.mark.fault(13)
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


def test_a_subject_is_not_named_like_the_folder_of_all_class_images(values: dict[str, Any]) -> None:
    values["subjects"]["classes"] = dict(values["subjects"]["biscuit"])
    assert problems_of(values) == [
        "params.yaml: subjects.classes: build/classes is of all subjects; choose another name"
    ]
    with pytest.raises(SubjectError, match="build/classes is of all"):
        check_id("classes")


def test_a_subject_of_an_unknown_class_is_refused(values: dict[str, Any]) -> None:
    values["subjects"]["biscuit"]["class_id"] = "dgo"
    assert problems_of(values) == [
        "params.yaml: subjects.biscuit.class_id: there is no class 'dgo'; did you mean 'dog'?"
    ]


@pytest.mark.fault(12)
def test_an_identifier_that_is_the_class_noun_is_refused(values: dict[str, Any]) -> None:
    values["subjects"]["biscuit"]["identifier"] = "Dog"
    assert "subjects.biscuit.identifier" in problems_of(values)[0]


@pytest.mark.parametrize("bad", ["../../etc", "/etc", "", "-x", "a b", "Ä", "a" * 42, "dog; touch X #"])
@pytest.mark.fault(11)
@pytest.mark.threat(6, 8)
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
@pytest.mark.threat(10)
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
        ({"max_train_steps": 50, "lr_warmup_steps": 50}, "train.lr_warmup_steps: 50 leave none of the 50 steps"),
        ({"max_train_steps": None, "lr_warmup_steps": 1200}, "train.lr_warmup_steps: 1200 leave none of the 1200"),
    ],
)
def test_what_cannot_work_together_is_refused(values: dict[str, Any], changes: dict[str, Any], said: str) -> None:
    values["train"] |= changes
    assert said in problems_of(values)[0]


def test_no_class_images_are_wanted_where_nothing_reads_them(values: dict[str, Any]) -> None:
    values["prior"]["num_class_images"] = 0
    assert "prior.num_class_images: 0 leaves train.prior_loss_weight without images" in problems_of(values)[0]
    values["train"]["method"] = "textual_inversion"
    assert not parse_params(values).has_prior


@pytest.mark.fault(12, 13)
@pytest.mark.threat(24)
@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("train.max_train_steps", 10**9),
        ("train.max_train_steps", -5),
        ("train.max_train_steps", True),
        ("train.train_batch_size", 10**6),
        ("train.gradient_accumulation_steps", 0),
        ("train.learning_rate", "fast"),
        ("train.learning_rate", float("nan")),
        ("train.learning_rate", float("inf")),
        ("train.learning_rate", -1e-6),
        ("train.learning_rate", 5.0),
        ("train.seed", 2**64),
        ("train.prior_loss_weight", -1.0),
        ("prior.num_class_images", 10**9),
        ("prior.num_inference_steps", 0),
        ("prior.scheduler", "magic"),
        ("base.resolution", 65),
        ("base.resolution", 10**6),
        ("base.revision", "main"),
        ("photos.max_pixels", 10**12),
        ("photos.min_count", 0),
        ("photos.prepared_side", 1 << 20),
        ("evaluate.seeds", []),
        ("evaluate.confidence", 1.5),
        ("gate.copy_rate", float("nan")),
        ("classes.dog.class_noun", ""),
        ("classes.dog.class_noun", " \n"),
        ("subjects.biscuit.identifier", ""),
        ("subjects.biscuit.identifier", "two words"),
        ("subjects.biscuit.identifier", "s\x1b[31m"),
        ("subjects.biscuit.kind", "alien"),
    ],
)
def test_an_absurd_value_is_refused_with_its_path(values: dict[str, Any], path: str, value: object) -> None:
    *sections, key = path.split(".")
    place = values
    for section in sections:
        place = place[section]
    place[key] = value
    problems = problems_of(values)
    assert [problem.split(": ")[1] for problem in problems] == [path]
    assert "\x1b" not in problems[0]


def test_a_prepared_side_under_the_resolution_is_refused(values: dict[str, Any]) -> None:
    values["base"]["resolution"] = 2048
    assert "photos.prepared_side: should be at least base.resolution 2048" in problems_of(values)[0]


@pytest.mark.threat(10)
def test_a_file_that_is_far_too_large_is_not_parsed(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("a: 1\n" * (MAX_BYTES // 5 + 1))
    with pytest.raises(ParamsError, match=f"larger than {MAX_BYTES} bytes"):
        load_params(tmp_path / "params.yaml")


@pytest.mark.fault(12)
@pytest.mark.parametrize("word", ["photo", "The", "of", "dog", "DOG", "=1+1", "-rf"])
def test_an_identifier_that_prompts_are_made_of_is_refused(values: dict[str, Any], word: str) -> None:
    values["subjects"]["biscuit"]["identifier"] = word
    assert [problem.split(": ")[1] for problem in problems_of(values)] == ["subjects.biscuit.identifier"]


@pytest.mark.fault(12)
@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("sks", None),
        ("zwx", None),
        ("biscuit", r"'biscuit' is 6 pieces to the tokenizer \(b is c u i t\), more than 3"),
        ("red", r"'red' is a frequent word to the base model \(token 584 of 1536\)"),
    ],
)
def test_the_tokenizer_of_the_base_says_whether_a_word_is_rare_and_short(word: str, said: str | None) -> None:
    remarks = remarks_by_tokenizer([word], TOKENIZER, COMMON)
    assert (remarks == []) if said is None else re.search(said, remarks[0])


@pytest.mark.fault(12)
@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("mydog", "'dog'"),
        ("catclock", "'clock'"),
        ("redbeach", "'beach'"),
        ("v1-dog", "'dog'"),
        ("xyphoto", "'photo'"),
        ("xqz", None),
        ("ohwx", None),
        ("bnha", None),
        ("rex", None),
        ("luker", None),  # ends in "ker", a frequent piece of words and no word
    ],
)
def test_an_identifier_that_holds_a_known_word_is_told_and_random_letters_are_not(word: str, said: str | None) -> None:
    told = remarks_by_tokenizer([word], TOKENIZER, COMMON | {"dog", "clock", "beach"})
    held = [remark for remark in told if "holds what the base model knows as" in remark]
    assert len(held) == (said is not None)
    assert said is None or f"knows as {said}: " in held[0]


@pytest.mark.fault(12)
def test_an_identifier_of_frequent_pieces_alone_is_told() -> None:
    def told(*pieces: str, ids: Sequence[int] = (600, 700)) -> list[str]:
        return list(identifier_remarks("redsofa", ids, pieces, 49408, COMMON))

    assert "knows as 'red', 'sofa': " in told("red", "sofa</w>")[0]
    assert told("red", "sofa</w>", ids=(600, 40000)) == []
    assert told("re", "sofa</w>") == []


def test_the_two_files_of_a_tokenizer_say_the_same_as_the_one(tmp_path: Path) -> None:
    """SD1.5 and SDXL have vocab.json and merges.txt on the hub."""
    model = json.loads((TOKENIZER / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, model["merges"])]))
    words = ["sks", "Red", "v1-dog", "biscuit", "<biscuit>", "café", "it's2"]
    assert remarks_by_tokenizer(words, tmp_path, {"dog"}) == remarks_by_tokenizer(words, TOKENIZER, {"dog"})
    assert len(remarks_by_tokenizer(words, tmp_path, {"dog"})) >= 3


def test_without_a_tokenizer_at_hand_nothing_is_said(tmp_path: Path) -> None:
    assert remarks_by_tokenizer(["biscuit"], tmp_path, COMMON) == []
    assert remarks_by_tokenizer(["biscuit"], None, COMMON) == []


@pytest.mark.parametrize(
    ("method", "kind", "weight", "has", "idle"),
    [
        ("full", "images", 1.0, True, False),
        ("pivotal", "teacher", 1.0, True, False),
        ("textual_inversion", "images", 1.0, False, True),
        ("textual_inversion", "none", 1.0, False, False),
        ("textual_inversion", "images", 0.0, False, True),
        ("full", "images", 0.0, False, True),
        ("full", "none", 1.0, False, False),
    ],
)
def test_a_prior_that_is_asked_for_and_not_trained_on_is_told(
    params_values: dict[str, Any], method: str, kind: str, weight: float, has: bool, idle: bool
) -> None:
    params_values["train"] |= {"method": method, "prior_loss_weight": weight}
    params_values["prior"]["kind"] = kind
    params = parse_params(params_values)
    assert params.has_prior is has
    said = [
        line
        for line in params.idle
        if line.endswith(f"prior.kind {kind} has no effect on it; prior.kind none saves the time of the stage prior")
    ]
    assert len(said) == idle


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_dora": True}, ["full has no LoRA: train.use_dora"]),
        ({"use_dora": True, "method": "pivotal"}, []),
        ({"embedding_learning_rate": 1e-3}, ["full learns no new word: train.embedding_learning_rate"]),
        ({"text_encoder_learning_rate": 1e-3}, []),
        (
            {"text_encoder_learning_rate": 1e-3, "train_text_encoder": False},
            ["train.train_text_encoder is false: train.text_encoder_learning_rate"],
        ),
        (
            {"method": "textual_inversion", "text_encoder_learning_rate": 1e-3},
            ["the new word alone: train.train_text_encoder", "the new word alone: train.text_encoder_learning_rate"],
        ),
        ({"num_processes": 2, "gradient_checkpointing": "auto"}, ["train.gradient_checkpointing auto"]),
    ],
)
def test_an_option_that_changes_nothing_is_told(
    params_values: dict[str, Any], changes: dict[str, Any], said: list[str]
) -> None:
    params_values["prior"]["kind"] = "none"
    params_values["train"] |= {"train_text_encoder": True} | changes
    lines = parse_params(params_values).idle
    assert len(lines) == len(said)
    assert all(f"{text} has no effect" in line for text, line in zip(said, lines, strict=True))


@pytest.mark.fault(41)
def test_a_file_of_an_older_version_is_refused_with_the_command_for_each_key_that_is_new(
    values: dict[str, Any],
) -> None:
    """Ours at the first commit had no registry, no formats of an export, and no rank."""
    del values["registry"], values["export"]["formats"], values["train"]["rank"]
    problems = problems_of(values)
    assert len(problems) == 3
    for problem in problems:
        command = re.search(r"missing, as in a file of an older version; add it: python -m (\S+) (\S+)$", problem)
        assert command is not None, problem
        told = subprocess.run(
            [sys.executable, "-m", *command.groups()], cwd=REPOSITORY, capture_output=True, text=True, check=True
        )
        assert told.stdout.startswith(command[2])
        assert len(told.stdout.split()) > 5


def test_every_parameter_says_what_it_means_and_an_unknown_one_is_refused() -> None:
    for section in Params.model_fields:
        assert all(re.fullmatch(r"[a-z_.]+(ID\.)?[a-z_0-9]+: \S.*", line) for line in describe(section)), section
    assert describe("subjects.rex.kind")[0].startswith("subjects.ID.kind: ")
    for name, said in {"trian": "did you mean 'train'", "train.rnk": "did you mean 'rank'"}.items():
        with pytest.raises(ParamsError, match=said):
            describe(name)
