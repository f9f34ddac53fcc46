import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants
from toy_project import REPOSITORY, dvc

from dreambooth.errors import EvaluationError, ModelError, ParamsError, PhotosError, RegistryError, SubjectError
from dreambooth.folders import scratch_folder
from dreambooth.models import load_model
from dreambooth.params import Base, Params, load_params, parse_params
from dreambooth.vocabulary import SCORER
from dreambooth.yaml12 import load_yaml
from flows.graph import Graph, Stage
from flows.lanes import Lanes
from flows.plan import (
    AROUND,
    AROUND_SECONDS,
    RATES,
    START,
    Measurement,
    longest_row,
    make_plan,
    note,
    note_around,
    read_measurements,
    seconds_of,
    units_of,
    work_of,
)
from flows.preflight import BUNDLED, poor_identifiers, remarks, require_inputs
from flows.tables import plan_table
from stages import train


@pytest.fixture
def params(project: Path) -> Params:
    return load_params(project / "params.yaml")


def test_time_is_a_start_and_a_rate_and_the_newest_measurements_count() -> None:
    assert seconds_of(10, [], default=2.0) == START + 20
    old, new = Measurement("train", "w", 100, START + 1000), Measurement("train", "w", 100, START + 100)
    assert seconds_of(200, [old, *[new] * 9], default=2.0) == pytest.approx(START + 200)


def test_a_stage_that_was_quicker_than_the_usual_start_is_planned_as_quick() -> None:
    assert seconds_of(1, [Measurement("report", "w", 1, 2.0)], default=5.0) == pytest.approx(2.2)


def test_units_follow_the_parameters(project: Path, params: Params) -> None:
    rows = 2 * params.train.train_batch_size
    assert units_of("train", "biscuit", params, project) == (params.train.max_train_steps or 0) * rows
    assert units_of("validate", "biscuit", params, project) == 3
    assert units_of("prior", "dog", params, project) == params.prior.num_class_images
    train = params.train.model_copy(update={"max_train_steps": None})
    assert units_of("train", "biscuit", params.model_copy(update={"train": train}), project) == 400 * rows


def test_a_plan_counts_what_is_stale_and_says_what_it_guesses(project: Path, params: Params) -> None:
    note(project, params, [("train@rex", 100.0), ("data/subjects/rex.dvc", 1.0)], Lanes())
    plan = make_plan(project, params, Graph.load(project), Lanes())
    by_entry = {line.entry: line for line in plan.lines}
    assert {entry: line.stages for entry, line in by_entry.items()} == {
        "prior": 1, "validate": 2, "train": 2, "evaluate": 2, "report": 2, "export": 2,
    }  # fmt: skip
    assert by_entry["train"].measured
    assert by_entry["train"].seconds == pytest.approx(200.0)
    assert not by_entry["prior"].measured
    words = plan.in_words(price=3600.0)
    assert any("by defaults" in line and "prior" in line and "train" not in line for line in words)
    assert f"cost: {plan.seconds:.2f} at 3600 an hour" in words
    half = make_plan(project, params, Graph.load(project), Lanes(2))
    assert f"cost: {half.seconds:.2f} at 3600 an hour" in half.in_words(3600.0)  # two lanes of one machine
    assert f"cost: {2 * half.seconds:.2f} at 3600 an hour each" in half.in_words(3600.0, machines=2)
    computing = sum(line.seconds for line in plan.lines if line.on_gpu)
    assert plan.seconds == pytest.approx(computing + AROUND_SECONDS)
    assert half.seconds == pytest.approx(max(computing / 2, half.longest) + AROUND_SECONDS)


def test_stages_that_wait_for_one_another_are_added_and_those_beside_are_not(project: Path, params: Params) -> None:
    graph = Graph.of({"a": (), "b": (), "c": ("a", "b"), "d": ("c",), "e": ("c",)}, {})
    assert longest_row(graph, {"a": 3, "b": 5, "c": 10, "d": 1, "e": 2}) == 17
    assert longest_row(graph, {"d": 1}) == 1
    assert longest_row(Graph(()), {}) == 0
    for entry in ("prior@dog", "validate@rex", "train@rex", "evaluate@rex", "report@rex", "export@rex"):
        note(project, params, [(entry, 20.0)], Lanes())
    one = make_plan(project, params, Graph.load(project).select(["rex"]), Lanes())
    assert one.longest == pytest.approx(80)  # prior or validate, train, evaluate, report or export
    assert one.seconds == pytest.approx(80 + AROUND_SECONDS)


def test_what_a_run_takes_beside_its_stages_is_planned_and_measured(project: Path, params: Params) -> None:
    graph = Graph.load(project).select(["rex"])
    before = make_plan(project, params, graph, Lanes())
    assert before.seconds >= before.longest + AROUND_SECONDS
    assert any("by defaults" in line and AROUND in line for line in before.in_words(None))
    assert [list(column.cells)[-1] for column in plan_table(before).columns] == [
        AROUND, "", "", f"{AROUND_SECONDS:.0f} s", "", "default",
    ]  # fmt: skip
    runs = [("validate@rex", 4.0), ("prior@dog", 10.0), ("train@rex", 20.0), ("evaluate@rex", 5.0), ("report@rex", 1.0)]
    for seconds in (61.0, 56.0, 63.0):
        note_around(project, graph, runs, seconds)
    after = make_plan(project, params, graph, Lanes())
    assert (after.around.measured, after.around.seconds) == (True, pytest.approx(25))
    assert not any(AROUND in line for line in after.in_words(None))
    note_around(project, graph, runs, 2.0)  # of a clock that was set back
    assert read_measurements(project)[-1].seconds == 0


def test_the_prompts_are_those_of_the_users_own_file(project: Path, params: Params) -> None:
    folder = project / params.evaluate.prompts
    lines = [f"recontextualisation,a photo of {{}} on hill {number}" for number in range(40)]
    (folder / "live.csv").write_text("\n".join(["kind,prompt", *lines]) + "\n")

    def units(**changes: object) -> int:
        evaluate = params.evaluate.model_copy(update={"seeds": [1], "num_class_images": 0, **changes})
        return units_of("evaluate", "rex", params.model_copy(update={"evaluate": evaluate}), project)

    assert units(max_prompts=None) == 2 * 40
    assert units(max_prompts=30) == 2 * 30
    assert units(max_prompts=50) == 2 * 40
    graph = Graph.load(project)
    require_inputs(project, params, graph)
    (folder / "live.csv").write_text("kind,prompt\nproperty,no place for it\n")
    assert units(max_prompts=None) == 2 * 25
    with pytest.raises(EvaluationError, match=r"live.csv: .*should have one \{\}"):
        require_inputs(project, params, graph)


def test_what_a_late_stage_would_refuse_is_refused_before_the_first(project: Path, params: Params) -> None:
    graph = Graph.load(project)
    require_inputs(project, params, graph)
    base = params.base.model_copy(update={"pretrained_model_name_or_path": "data/base/emoji65"})
    with pytest.raises(ModelError, match=r"data/base/emoji65 is no folder in .* and no hub id"):
        require_inputs(project, params.model_copy(update={"base": base}), graph)
    hub = params.base.model_copy(update={"pretrained_model_name_or_path": "owner/name"})
    with pytest.raises(ModelError, match="should be the 40-digit commit"):
        require_inputs(project, params.model_copy(update={"base": hub}), graph)
    done = Graph(tuple(dataclasses.replace(stage, stale=False) for stage in graph.stages))
    require_inputs(project, params.model_copy(update={"base": base}), done)  # nothing would ask for it
    project.rename(project.with_name("a%41b"))
    with pytest.raises(RegistryError, match=r"/a%41b: MLflow reads it as .*/aAb, so that nothing can be registered"):
        require_inputs(project.with_name("a%41b"), params, graph)


def test_a_solver_that_cannot_draw_with_the_base_is_refused_before_the_first_stage(
    project: Path, params: Params
) -> None:
    about = project / BUNDLED / "scheduler/scheduler_config.json"
    about.parent.mkdir(parents=True)
    about.write_text('{"rescale_betas_zero_snr": true}')
    graph, evaluate = Graph.load(project), params.evaluate.model_copy(update={"scheduler": "pndm"})
    require_inputs(project, params, graph)
    with pytest.raises(
        ParamsError, match=r"params\.yaml: evaluate\.scheduler pndm would draw on another noise schedule"
    ):
        require_inputs(project, params.model_copy(update={"evaluate": evaluate}), graph)
    for torn, told in (("{", "is not JSON"), ("[]", "holds no object of JSON")):
        about.write_text(torn)
        with pytest.raises(ModelError, match=told):
            require_inputs(project, params, graph)


def test_prompts_that_the_base_does_not_read_to_their_subject_are_refused_before_the_first_stage(
    project: Path, params: Params
) -> None:
    shutil.copytree(REPOSITORY / "data/base/emoji64/tokenizer", project / BUNDLED / "tokenizer")
    graph, long = Graph.load(project), "a red wall behind a table, " * 5
    assert require_inputs(project, params, graph) == []
    photo = next((project / "data/subjects/rex").glob("*.png"))
    caption = photo.with_suffix(".txt")
    caption.write_text(f"a photo of {{}}, {long}")
    (remark,) = require_inputs(project, params, graph)
    assert remark.startswith(f"{caption}: has ")
    caption.write_text(f"a photo of {long}{{}}")
    with pytest.raises(PhotosError, match=r"\.txt: 'sks dog' ends at token \d+, and the base reads 30"):
        require_inputs(project, params, graph)
    caption.unlink()
    prior = params.prior.model_copy(update={"prompts": [f"{long}{{}}"]})
    with pytest.raises(ParamsError, match=r"prior\.prompts\.0: 'a dog' ends at token"):
        require_inputs(project, params.model_copy(update={"prior": prior}), graph)
    file = project / params.prompts_file("rex")
    file.write_text(f'{file.read_text()}property,"a photo of {{}}, {long}"\n')
    (remark,) = require_inputs(project, params, graph)
    assert remark.startswith(f"{params.prompts_file('rex')}: has ")


def test_photos_that_are_nowhere_are_refused_before_the_first_stage(project: Path, params: Params) -> None:
    graph = Graph.load(project)
    done = Graph(tuple(dataclasses.replace(stage, stale=False) for stage in graph.stages))
    shutil.rmtree(project / "data/subjects/rex")
    require_inputs(project, params, done)
    with pytest.raises(SubjectError, match="data/subjects/rex does not exist; put the photos there"):
        require_inputs(project, params, graph)


def test_a_class_that_the_bundled_scorer_does_not_know_is_told_before_the_training(
    project: Path, params: Params
) -> None:
    shutil.copytree(REPOSITORY / SCORER, project / SCORER)
    graph = Graph.load(project)
    assert make_plan(project, params, graph, Lanes()).remarks == []
    classes = {name: one.model_copy(update={"class_noun": "golden retreiver"}) for name, one in params.classes.items()}
    (remark,) = make_plan(project, params.model_copy(update={"classes": classes}), graph, Lanes()).remarks
    assert "the bundled scorer does not know 'golden', 'retreiver' of the class 'golden retreiver'" in remark
    assert remark.endswith(f"; its words stand in {SCORER}/vocabulary.json")


def test_a_base_whose_pictures_the_bundled_scorer_never_saw_is_told_before_the_training(
    project: Path, params: Params
) -> None:
    graph = Graph.load(project)

    def told(encoders: str, **base: object) -> list[str]:
        changed = {
            "base": params.base.model_copy(update=base),
            "evaluate": params.evaluate.model_copy(update={"encoders": encoders}),
        }
        made = make_plan(project, params.model_copy(update=changed), graph, Lanes())
        return [line for line in made.in_words(None) if "evaluate.encoders" in line]

    hub = {"pretrained_model_name_or_path": "owner/name", "revision": "0" * 40}
    (remark,) = told("bundled", **hub)
    assert "knows drawings of 64 pixels, and the base is owner/name; for photos: evaluate.encoders: hub" in remark
    assert told("hub", **hub) == told("bundled") == []
    assert told("bundled", pretrained_model_name_or_path="./data/base/emoji64/") == []
    done = Graph(tuple(dataclasses.replace(stage, stale=False) for stage in graph.stages))
    assert remarks(project, params.model_copy(update={"base": params.base.model_copy(update=hub)}), done) == []


def test_an_identifier_is_looked_up_in_the_tokenizer_of_the_base_and_in_the_cache_of_the_hub(
    project: Path, params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = REPOSITORY / "data/base/emoji64/tokenizer"
    hub = Base(pretrained_model_name_or_path="owner/name", revision="0" * 40, resolution=512, inference_dtype="float16")

    def told(base: Base, identifier: str) -> list[str]:
        return list(poor_identifiers(project, params.model_copy(update={"base": base}), [identifier], ["dog"]))

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert told(hub, "mydog") == []
    place = tmp_path / "models--owner--name/snapshots" / str(hub.revision) / "tokenizer"
    shutil.copytree(tokenizer, place)
    assert "'mydog' holds what the base model knows as 'dog'" in told(hub, "mydog")[0]
    shutil.copytree(tokenizer, project / BUNDLED / "tokenizer")
    assert "'mydog' holds" in told(params.base, "mydog")[0]
    assert told(params.base, "sks") == []
    assert "'sks' is a rifle to Stable Diffusion" in told(hub, "sks")[0]
    word = params.model_copy(update={"train": params.train.model_copy(update={"method": "textual_inversion"})})
    assert list(poor_identifiers(project, word, ["<dog>"], ["dog"])) == []  # it becomes a token of its own


@pytest.mark.fault(12)
@pytest.mark.parametrize("word", ["mydog", "redfox", "xbeach", "zdog"])
def test_the_training_says_of_an_identifier_what_the_plan_says(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    values = load_yaml((REPOSITORY / "params.yaml").read_text())
    values["subjects"]["chime"]["identifier"] = word
    params, base = parse_params(values), REPOSITORY / BUNDLED
    planned = list(poor_identifiers(REPOSITORY, params, [word], [params.class_of("chime").class_noun]))
    train._say_remarks(params, "chime", REPOSITORY, load_model(base, parts=["tokenizer"]), 3, [])
    assert [f"train chime: warning: {remark}" for remark in planned] == capsys.readouterr().out.splitlines()
    assert len(planned) == 1


@pytest.mark.parametrize(
    ("entry", "section", "changes"),
    [
        ("train", "train", {"method": "lora"}),
        ("prior", "prior", {"guidance_scale": 1.0}),
        ("evaluate", "evaluate", {"guidance_scale": 1.0}),
    ],
)
def test_work_of_another_method_or_without_guidance_is_not_compared(
    entry: str, section: str, changes: dict[str, object], params: Params
) -> None:
    other = params.model_copy(update={section: getattr(params, section).model_copy(update=changes)})
    assert work_of(entry, params, Lanes()) != work_of(entry, other, Lanes())
    alike = getattr(params, section).model_copy(update={"guidance_scale": 7.5} if section != "train" else {"seed": 9})
    assert work_of(entry, params, Lanes()) == work_of(entry, params.model_copy(update={section: alike}), Lanes())


def test_class_images_that_nobody_draws_are_not_counted(project: Path, params: Params) -> None:
    teacher = params.model_copy(update={"prior": params.prior.model_copy(update={"kind": "teacher"})})
    assert units_of("prior", "dog", teacher, project) == 1


def test_what_was_measured_with_all_cores_says_nothing_of_a_share_of_them(project: Path, params: Params) -> None:
    note(project, params, [("train@rex", 100.0), ("report@rex", 5.0)], Lanes())
    shared = {
        line.entry: line for line in make_plan(project, params, Graph.load(project), Lanes(2, {"train": 1})).lines
    }
    assert not shared["train"].measured
    assert shared["report"].measured


def test_a_prior_without_effect_is_said_and_its_rows_are_not_counted(project: Path, params: Params) -> None:
    word = params.model_copy(update={"train": params.train.model_copy(update={"method": "textual_inversion"})})
    assert 2 * units_of("train", "biscuit", word, project) == units_of("train", "biscuit", params, project)
    said = [make_plan(project, one, Graph.load(project), Lanes()).in_words(None) for one in (params, word)]
    remark = "train.method textual_inversion reads no class rows: prior.kind images has no effect on it"
    assert [sum(line.startswith(remark) for line in lines) for lines in said] == [0, 1]


def test_after_a_run_nothing_is_planned_and_sizes_are_known(project: Path, params: Params) -> None:
    dvc(project, "repro")
    graph = Graph.load(project)
    assert make_plan(project, params, graph, Lanes()).in_words(None) == [
        f"Nothing would run: all {len(graph.stages)} stages are up to date."
    ]
    size = graph["export@rex"].size
    assert size == sum(path.stat().st_size for path in (project / "export/rex").iterdir())
    stale = Graph((*graph.stages, Stage("export@tom", stale=True, reasons=("never ran",))))
    (line,) = make_plan(project, params, stale, Lanes()).lines
    assert line.size == pytest.approx(size, abs=2)  # like those of the others; names differ in length


def test_a_torn_line_of_rates_is_passed_over(project: Path, params: Params) -> None:
    note(project, params, [("export@rex", 5.0)], Lanes())
    with (scratch_folder(project) / RATES).open("a") as file:
        file.write('{"entry": "tr')
    (only,) = read_measurements(project)
    assert (only.entry, only.seconds) == ("export", 5.0)
    assert json.loads((scratch_folder(project) / RATES).read_text().splitlines()[0])["units"] == 1
