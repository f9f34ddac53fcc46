"""The report: one file, all pictures inside, nothing fetched or run, every text escaped."""

import base64
import dataclasses
import hashlib
import io
import itertools
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from matplotlib.figure import Figure as Plot
from PIL import Image
from tiny_project import REPOSITORY, make_photo

from dreambooth.card import _scores
from dreambooth.curves import _write_labels
from dreambooth.evaluation import Encoders, cases, class_seeds, reference, score, summarise
from dreambooth.fidelity import paired_interval
from dreambooth.folders import new_folder
from dreambooth.gate import decide, read_scorecard
from dreambooth.images import png_bytes
from dreambooth.pages import picture_of, write_index
from dreambooth.params import parse_params
from dreambooth.prompts import Template
from dreambooth.report import (
    MEASURES,
    Sources,
    _advice,
    _summary_note,
    _tradeoff_note,
    make_report,
    provenance,
    read_points,
    rehearsal_note,
    summary_table,
    write_report,
)
from dreambooth.versions import in_words
from flows import summary

MARGINS = parse_params(yaml.safe_load((REPOSITORY / "params.yaml").read_text())).gate
EVIL = "<script>document.title='owned'</script>"
TEMPLATES = [Template("recontextualisation", f"a photo of {{}} in place {i} {EVIL}") for i in range(6)]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class PatchEncoder:
    """Embeds a picture as its pixels at 4 x 4: real cosines without a network."""

    name, revision, transform, copy_cosine = "patches", "1", "4 x 4", 0.999

    def embed(self, images: Any, batch_size: int = 16) -> Any:
        rows = [list(image.resize((4, 4)).convert("L").tobytes()) for image in images]
        return torch.nn.functional.normalize(torch.tensor(rows, dtype=torch.float32) + 1, dim=1)

    embed_images = embed

    def embed_texts(self, prompts: Any) -> Any:
        return torch.nn.functional.normalize(torch.rand(len(prompts), 16, generator=torch.Generator().manual_seed(0)))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Sources, dict[str, Any]]:
    """Write what the stages leave: photos, pictures of two models, their scores, a loss curve."""
    root, encoders = tmp_path_factory.mktemp("report"), Encoders(PatchEncoder(), PatchEncoder())
    photos = [make_photo(number, 64) for number in range(4)]
    with new_folder(root / "instance", {"photos": [{"file": f"{i:02d}.png"} for i in range(4)]}) as target:
        row = {"file": f"{EVIL}.jpg", "width": 64, "height": 48, "usable": True, "codes": ["W_IMG_BLUR"]}
        row |= {"remarks": ["blurred (W_IMG_BLUR)"], "duplicate_of": None, "prepared": "00.png", "hash": ""}
        row |= {"quality": {"sharpness": 3.2, "brightness": 120.0, "contrast": 30.0}}
        left_out = row | {"prepared": None, "quality": None, "remarks": [], "duplicate_of": f"{EVIL}.jpg"}
        table = {"photos": [row, left_out], "remarks": [], "ignored": []}
        (target / "photos.json").write_text(json.dumps(table))
        for number, photo in enumerate(photos):
            (target / f"{number:02d}.png").write_bytes(png_bytes(photo))
    todo, seen = cases(TEMPLATES, "dog", [1, 2]), reference(photos, encoders)
    texts = encoders.text.embed_texts(range(6)) if encoders.text else None
    pictures = {
        "base": [make_photo(100 + i, 64) for i in range(16)],
        "personalised": [*photos[:2], *(make_photo(200 + i, 64) for i in range(14))],  # two copies
    }
    tables: dict[str, list[pd.DataFrame]] = {"scores": [], "prompts": [], "class_images": []}
    scored = {}
    for name, images in pictures.items():
        scored[name] = found = score(todo, images[:12], images[12:], seen, encoders, texts)
        parts = (found.cases.assign(flat=False), found.prompts, pd.DataFrame({"pres": found.pres, "flat": False}))
        for table, part in zip(tables.values(), parts, strict=True):
            table.append(part.assign(model=name))
        for folder, some in ((name, images[:12]), (f"class/{name}", images[12:])):
            (root / "evaluation" / folder).mkdir(parents=True)
            for number, image in enumerate(some):
                (root / f"evaluation/{folder}/{number:03d}.png").write_bytes(png_bytes(image))
    for table_name, parts_of in tables.items():
        pd.concat(parts_of).to_csv(root / f"evaluation/{table_name}.csv", index=False)
    how = {
        "cases": [{"seed": 1}, {"seed": 2}], "class_prompt": "a photo of a dog", "class_seeds": class_seeds(4, 0),
        "code": "c", "device": "cpu", "dtype": "float32", "encoders": encoders.describe(), "photos": "p",
        "settings": {"scheduler": "ddim", "negative_prompt": ""}, "versions": {"torch": "2"},
    }  # fmt: skip
    models = {name: {"model": name, "is_base": name == "base"} for name in ("base", "personalised")}
    (root / "evaluation/evaluation.json").write_text(json.dumps({"how": how, "models": models}))
    (root / "evaluation/.cost.json").write_text(json.dumps({"seconds_per_image_drawn": 0.5}))
    Image.new("RGB", (8, 8)).save(root / "evaluation/grid.png")
    (root / "trained").mkdir()
    history = {"step": range(50), "loss_instance": [1 / (i + 1) for i in range(50)], "loss_prior": [0.1] * 50}
    pd.DataFrame(history).to_csv(root / "trained/loss.csv", index=False)
    metrics = summarise(scored["base"], scored["personalised"], seen, 0.95) | encoders.describe()
    return Sources(root / "evaluation", root / "instance", root / "trained", f"CC BY 4.0 {EVIL}"), metrics


@pytest.fixture(scope="module")
def page(sources: tuple[Sources, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the report of a subject called <script>."""
    where, metrics = sources
    decision = decide(*(read_scorecard(where.evaluation, name) for name in ("personalised", "base")), MARGINS)
    target = tmp_path_factory.mktemp("page")
    write_report(target, EVIL, where, metrics, decision, 0.03)
    return target / "index.html"


class Seen(HTMLParser):
    """Collects the tags of a page with their attributes, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_every_picture_is_inside_and_decodes(page: Path) -> None:
    images = Seen(page).all("img")
    assert len(images) == 4 + 2 * 12 + 2 * 12 + 2 * 4 + 2  # photos, grid, nearest, class images, curves
    for attributes in images:
        kind, content = re.fullmatch(r"data:image/(png|jpeg);base64,(.+)", attributes["src"] or "").groups()  # type: ignore[union-attr]
        with Image.open(io.BytesIO(base64.b64decode(content)), formats=[kind.upper()]) as image:
            image.load()
        assert attributes["alt"]


@pytest.mark.threat(18)
def test_nothing_is_fetched_and_nothing_is_run(page: Path) -> None:
    seen = Seen(page)
    assert {tag for tag, _ in seen.tags} & {"script", "iframe", "object", "embed", "form", "base"} == set()
    for tag, attributes in seen.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag
        links = [value for name, value in attributes.items() if name in ("src", "href", "srcset", "action")]
        assert all((link or "").startswith("data:") for link in links), tag
    assert not re.search(r"url\(|@import", page.read_text())


@pytest.mark.threat(18)
def test_the_policy_of_the_page_allows_its_own_style_and_pictures_alone(page: Path) -> None:
    text = page.read_text()
    policy = next(
        one["content"] for one in Seen(page).all("meta") if one.get("http-equiv") == "Content-Security-Policy"
    )
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL).group(1)  # type: ignore[union-attr]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    wanted = f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert policy == wanted
    assert text.index("Content-Security-Policy") < text.index("<style>")


@pytest.mark.threat(18)
def test_a_subject_called_script_stays_text(page: Path) -> None:
    seen = Seen(page)
    assert seen.all("script") == []
    assert "".join(seen.text).count(EVIL) >= 4  # title, heading, prompts, licence


@pytest.mark.fault(9)
@pytest.mark.threat(18)
def test_every_photo_has_a_row_with_its_codes(page: Path) -> None:
    text = " ".join("".join(Seen(page).text).split())
    assert "blurred (W_IMG_BLUR)" in text
    assert f"{EVIL}.jpg" in text
    rows = json.loads((page.parent / "report.json").read_text())["photos"]
    assert [row["found"] for row in rows] == ["blurred (W_IMG_BLUR)", f"the same as {EVIL}.jpg"]


def test_copies_are_framed_and_come_first(page: Path) -> None:
    pairs = [one["class"] for one in Seen(page).all("div") if (one.get("class") or "").startswith("pair ")]
    assert pairs == ["pair copy", "pair copy"]
    text = page.read_text()
    nearest = text[text.index("<h2>Nearest photos") :]
    assert nearest.index("pair copy") < nearest.index('class="pair"')


def test_the_eight_parts_are_there_with_the_reason_of_the_verdict(page: Path) -> None:
    text = " ".join("".join(Seen(page).text).split())
    parts = ("Photos and pictures", "Prompts", "Nearest photos", "Prior: a photo of a dog", "Identity against prompt")
    for part in (*parts, "Loss", "Provenance", "not checked", "CC BY 4.0", "seconds per image drawn", "worst 5"):
        assert part in text
    assert json.loads((page.parent / "report.json").read_text())["decision"]["line"] in text
    assert 'name="viewport"' in page.read_text()


def test_scores_lie_beside_the_page_for_programs(page: Path) -> None:
    told = json.loads((page.parent / "report.json").read_text())
    assert told["decision"]["verdict"] == "keep"
    assert told["metrics"]["copying"]["rate"] == pytest.approx(2 / 12)
    assert len(pd.read_csv(page.parent / "prompts.csv")) == 12
    for name in ("loss.png", "tradeoff.png", "grid.png"):
        with Image.open(page.parent / name) as image:
            image.load()


@pytest.mark.fault(43)
def test_what_was_not_measured_says_so(sources: tuple[Sources, dict[str, Any]]) -> None:
    where, metrics = sources
    less = {name: value for name, value in metrics.items() if name not in ("prompt", "prior")}
    decision = decide(*(read_scorecard(where.evaluation, name) for name in ("personalised", "base")), MARGINS)
    report = make_report("biscuit", where, less, decision, 0.03)
    assert ["prompt", "", "", "not measured", ""] in [list(row) for row in report.summary.rows]
    assert report.tradeoff == ""
    assert "Not measured" in report.prior


def test_prompts_that_class_images_had_too_are_told_from_those_that_nothing_rehearsed() -> None:
    rows = [("in space", 0.5, 0.6), ("on a beach", 0.5, 0.8), ("in a park", 0.5, 0.3)]
    table = pd.DataFrame(
        {"prompt": prompt, "prompt_fidelity": score, "model": model}
        for prompt, *scores in rows
        for model, score in zip(("base", "personalised"), scores, strict=True)
    )
    models = ["base", "personalised"]
    assert rehearsal_note(table, models, ["in space", "on a beach", "elsewhere"]) == (
        " 2 of the 3 prompts were rehearsed by class images (prior.prompts): prompt fidelity against the base is "
        "+0.200 over these, -0.200 over the others."
    )
    assert "3 of the 3 prompts" in (every := rehearsal_note(table, models, [prompt for prompt, *_ in rows]))
    assert every.endswith("how others fare was not measured.")
    assert rehearsal_note(table, models, ["elsewhere"]) == ""
    assert rehearsal_note(table.assign(prompt_fidelity=float("nan")), models, ["in space"]) == ""


@pytest.mark.fault(43)
def test_a_picture_that_is_missing_or_torn_is_a_gap_that_says_so(
    sources: tuple[Sources, dict[str, Any]], tmp_path: Path
) -> None:
    where, metrics = sources
    copy = Path(shutil.copytree(where.evaluation, tmp_path / "evaluation"))
    for name in ("personalised/000.png", "class/base/001.png", "grid.png"):
        (copy / name).unlink()
    (copy / "base/002.png").write_bytes((copy / "base/002.png").read_bytes()[:100])
    decision = decide(*(read_scorecard(copy, name) for name in ("personalised", "base")), MARGINS)
    (tmp_path / "page").mkdir()
    write_report(tmp_path / "page", "biscuit", dataclasses.replace(where, evaluation=copy), metrics, decision, 0.03)
    text = (tmp_path / "page/index.html").read_text()
    shown = re.findall(r'alt="(\w+: \w+)".*?<figcaption>[^<]*, picture (\w+)</figcaption>', text)
    assert set(shown) == {("personalised: missing", "missing"), ("base: missing", "missing"), ("base: torn", "torn")}
    assert not (tmp_path / "page/grid.png").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b'{"title": "x"}', None])
def test_a_report_of_another_subject_that_cannot_be_read_stops_no_index(tmp_path: Path, content: bytes | None) -> None:
    told = {"title": "biscuit: a dog", "decision": {"line": "keep"}}
    told["metrics"] = {"identity": {"base": 0.1, "personalised": 0.2}}
    for name in ("biscuit", "rex"):
        (tmp_path / name).mkdir()
    (tmp_path / "biscuit/report.json").write_text(json.dumps(told))
    if content is None:
        (tmp_path / "rex/report.json").mkdir()
    else:
        (tmp_path / "rex/report.json").write_bytes(content)
    write_index(tmp_path, {"biscuit": "v1"})
    text = (tmp_path / "index.html").read_text()
    assert "0.100 -&gt; 0.200" in text
    assert "dvc repro report@rex" in text


@pytest.mark.fault(22)
def test_a_page_whose_scores_are_of_black_pictures_says_so_and_what_to_do(
    sources: tuple[Sources, dict[str, Any]],
) -> None:
    where, metrics = sources
    decision = decide(*(read_scorecard(where.evaluation, name) for name in ("personalised", "base")), MARGINS)
    black = metrics | {"flat": {"base": 3, "personalised": 0}}
    note = make_report("biscuit", where, black, decision, 0.03).summary_note
    assert "black or of one colour: base 3;" in note
    assert "set base.inference_dtype to float32" in note
    for fine in (metrics, metrics | {"flat": {"base": 0, "personalised": 0}}):  # the first of an older evaluation
        assert "black" not in make_report("biscuit", where, fine, decision, 0.03).summary_note


def test_the_second_opinion_on_the_identity_stands_beside_the_first_and_says_that_it_decides_nothing(
    page: Path, sources: tuple[Sources, dict[str, Any]]
) -> None:
    second = sources[1]["identity_second"]
    difference = f"{second['gain']:+.3f} [{second['low']:+.3f}, {second['high']:+.3f}]"
    told = dict(zip(("measure", "base", "model", "difference", "over"), summary_table(sources[1]).rows[1], strict=True))
    assert told["measure"] == "identity, second opinion (decides nothing)"
    assert (told["model"], told["difference"]) == (f"{second['personalised']:.3f}", difference)
    text = " ".join("".join(Seen(page).text).split())
    assert "The second opinion is that of patches" in text
    assert text.count("second opinion") >= 3  # summary, its note, tables of prompts
    assert f"identity by patches, which decided nothing | {second['personalised']:.3f}, {difference}" in _scores(
        sources[1]
    )
    first = {name: value for name, value in sources[1].items() if name != "identity_second"}
    assert "second opinion" not in str(summary_table(first).rows)


def test_each_measure_says_over_how_many_prompts_it_is_and_those_of_a_property_count_for_all_but_the_identity() -> None:
    encoders = Encoders(PatchEncoder(), PatchEncoder())
    kinds = [("recontextualisation", 8), ("property", 4)]
    templates = [Template(kind, f"a {kind} {i} of {{}}") for kind, count in kinds for i in range(count)]
    todo = cases(templates, "dog", [1, 2])
    seen, texts = reference([make_photo(i, 64) for i in range(3)], encoders), PatchEncoder().embed_texts(range(12))
    pictures = [[make_photo(number + i, 64) for i in range(30)] for number in (100, 200)]
    base, ours = (score(todo, images[:24], images[24:], seen, encoders, texts) for images in pictures)
    metrics = summarise(base, ours, seen, 0.95) | encoders.describe()
    table = summary_table(metrics)
    assert {row[0]: row[4] for row in table.rows} == {
        "identity": "8 prompts", "identity, second opinion (decides nothing)": "8 prompts", "prompt": "12 prompts",
        "diversity": "12 prompts", "copies": "", "PRES (less is better)": "6 class images",
    }  # fmt: skip
    assert "8" not in "".join([*table.columns, _summary_note(metrics).partition("The photos")[0]])
    identity, prompt = (line for line in _scores(metrics).splitlines() if "prompts |" in line)
    assert "interval over 8 prompts" in identity
    assert "prompt fidelity against the base, over 12 prompts" in prompt


@pytest.mark.parametrize(("prompts", "has_interval"), [(5, False), (6, True)])
def test_over_fewer_than_six_prompts_scores_are_shown_without_an_interval(
    sources: tuple[Sources, dict[str, Any]], prompts: int, has_interval: bool
) -> None:
    where, metrics = sources
    few = {name: metrics[name] | {"prompts": prompts} for name in MEASURES}
    metrics = metrics | few | {"prompts": prompts}
    assert ("an interval says little" in _summary_note(metrics)) != has_interval
    differences = {row[0]: row[3] for row in summary_table(metrics).rows}
    assert ["[" in differences[name] for name in ("identity", "prompt", "diversity")] == [has_interval] * 3
    points = read_points(where.evaluation, metrics, None)
    assert points is not None
    assert points["identity_error"].notna().all() == has_interval
    assert ("bars" in _tradeoff_note(points, 0.03, None, {}, 0.95)) == has_interval
    assert (f"[{metrics['identity']['low']:+.3f}" in _scores(metrics)) == has_interval


@pytest.mark.parametrize(
    ("prompts", "gain"), [(5, "+0.300 over 5 prompts"), (6, "+0.300 [+0.200, +0.400] over 6 prompts")]
)
def test_who_runs_a_subject_is_told_an_interval_only_over_enough_prompts(
    tmp_path: Path, prompts: int, gain: str
) -> None:
    identity = {"base": 0.3, "personalised": 0.6, "gain": 0.3, "low": 0.2, "high": 0.4, "ceiling": 0.7}
    (tmp_path / "rex.json").write_text(json.dumps({"identity": identity, "prompts": prompts}))
    found = summary.read_identity(tmp_path / "rex.json")
    assert dict(summary.rows(summary.Summary("rex", "dog", "sks", "dog", 5, found, None, None, None)))["gain"] == gain


def test_with_scored_previews_the_plot_has_a_point_a_step_and_a_choice(
    sources: tuple[Sources, dict[str, Any]], tmp_path: Path
) -> None:
    where, metrics = sources
    copy = Path(shutil.copytree(where.evaluation, tmp_path / "evaluation"))
    points = {"step": [50, 100, 150], "identity": [0.3, 0.5, 0.6], "prompt": [0.4, 0.39, 0.2]}
    errors = {"identity_error": [0.1] * 3, "prompt_error": [0.1] * 3, "prompts": [6] * 3}
    pd.DataFrame(points | errors).to_csv(copy / "checkpoints.csv", index=False)
    decision = decide(*(read_scorecard(copy, name) for name in ("personalised", "base")), MARGINS)
    report = make_report("biscuit", dataclasses.replace(where, evaluation=copy), metrics, decision, 0.03)
    assert "previews of 6 prompts" in report.tradeoff_note
    assert "step 100. Its weights were removed" in report.tradeoff_note
    assert report.tradeoff.startswith("data:image/png")


def points_of(error: float, prompts: int = 6) -> pd.DataFrame:
    """Return three steps; the second one has the most identity within .03 of the best prompt fidelity."""
    means = {"step": [50, 100, 150], "identity": [0.3, 0.5, 0.6], "prompt": [0.4, 0.39, 0.2], "prompts": [prompts] * 3}
    return pd.DataFrame(means | {"identity_error": [error] * 3, "prompt_error": [error] * 3})


def test_a_step_that_is_better_comes_with_the_way_to_get_it_for_its_weights_are_gone() -> None:
    advice = _advice(points_of(0.1), 0.03, 150, "constant", 0.95)
    assert advice.endswith("set train.max_train_steps to 100 and run it again: dreambooth run.")
    assert _advice(points_of(0.1), 0.03, 150, "cosine", 0.95).endswith(
        "falls to 0 by there (cosine), for other weights."
    )


def test_a_step_that_is_not_told_apart_from_the_last_one_is_no_advice() -> None:
    for error, prompts in ((0.15, 6), (float("nan"), 6), (0.01, 5)):
        advice = _advice(points_of(error, prompts), 0.03, 150, "constant", 0.95)
        assert f"by {prompts} prompts the best of 3 steps is not told apart" in advice
        assert "max_train_steps" not in advice


@pytest.mark.parametrize("prompts", [6, 12])
@pytest.mark.parametrize("steps", [4, 10])
def test_of_trainings_whose_steps_are_all_alike_few_are_advised_to_be_shorter(prompts: int, steps: int) -> None:
    advised = 0
    for seed in range(200):
        values = 0.5 + np.random.default_rng(seed).normal(0, 0.03, (2, steps, prompts))
        points = pd.DataFrame({"step": range(1, steps + 1), "prompts": prompts})
        for name, found in zip(("identity", "prompt"), values, strict=True):
            intervals = [paired_interval(torch.tensor(one - found[-1])) for one in found]
            points[name] = found.mean(axis=1)
            points[f"{name}_error"] = [(one.high - one.low) / 2 for one in intervals]
        advised += "max_train_steps" in _advice(points, 0.03, steps, "constant", 0.95)
    assert advised < 0.05 * 200


def test_the_step_that_is_shipped_says_so() -> None:
    assert _advice(points_of(0.1), 0.5, 150, "constant", 0.95).endswith("step 150, which is the one that is shipped.")
    assert _advice(points_of(0.1), 0.5, None, "constant", 0.95).endswith("step 150, the last one.")
    assert "average over the steps" in _tradeoff_note(points_of(0.1), 0.5, None, {"ema_decay": 0.99}, 0.95)
    assert "Shipped is step 147, without a preview." in _tradeoff_note(points_of(0.1), 0.5, 147, {}, 0.95)
    assert "Shipped is a step that was not noted" in _tradeoff_note(
        points_of(0.1), 0.5, None, {}, 0.95
    )  # by an older training
    assert "Shipped" not in _tradeoff_note(points_of(0.1), 0.5, 150, {}, 0.95)


@pytest.mark.parametrize(("shipped", "label"), [(150, "step 150"), (100, "step 100"), (None, None)])
def test_the_label_of_the_shipped_step_is_that_of_the_training_and_no_guess_from_its_losses(
    sources: tuple[Sources, dict[str, Any]], tmp_path: Path, shipped: int | None, label: str | None
) -> None:
    where, metrics = sources
    copy = Path(shutil.copytree(where.evaluation.parent, tmp_path / "all"))
    points_of(0.1).to_csv(copy / "evaluation/checkpoints.csv", index=False)
    losses = {"step": [50, 100, 150], "loss_instance": [0.3, 0.1, 0.2], "loss_prior": 0.1, "score": [0.3, 0.1, 0.2]}
    pd.DataFrame(losses).to_csv(copy / "trained/evaluation_loss.csv", index=False)
    training = {"inputs": {"train": {"load_best_model_at_end": True}}, "shipped_step": shipped}
    ours = Sources(copy / "evaluation", copy / "instance", copy / "trained", "", training)
    decision = decide(*(read_scorecard(ours.evaluation, name) for name in ("personalised", "base")), MARGINS)
    points = read_points(ours.evaluation, metrics, shipped)
    assert points is not None
    labelled = [one for one in points["label"] if "shipped" in one]
    assert labelled == ([f"{label} (shipped)"] if label else [])
    note = make_report("biscuit", ours, metrics, decision, 0.03).tradeoff_note
    assert ("step 100, which is the one that is shipped" in note) == (shipped == 100)


def test_labels_of_steps_that_lie_together_do_not_cover_each_other() -> None:
    plot = Plot(figsize=(5.5, 4), layout="constrained")
    axes = plot.add_subplot()
    points = pd.DataFrame({"label": [f"step {i}" for i in range(4)], "prompt": [0.5] * 4, "identity": [0.5] * 4})
    axes.plot(points["prompt"], points["identity"])
    _write_labels(plot, axes, points)
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == 4
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def test_a_page_without_a_safety_check_says_how_to_have_one_and_no_measure_claims_it(
    sources: tuple[Sources, dict[str, Any]],
) -> None:
    where, metrics = sources
    assert "safety" not in {row[0] for row in summary_table(metrics).rows}
    about = json.loads((where.evaluation / "evaluation.json").read_text())
    safety = dict(provenance(about, metrics, where).rows)["safety"]
    assert safety.startswith("not checked")
    assert "run a safety checker over the PNG files" in safety


def test_two_reports_say_what_their_trainings_did_differently(sources: tuple[Sources, dict[str, Any]]) -> None:
    where, metrics = sources
    about = json.loads((where.evaluation / "evaluation.json").read_text())
    recipe = {"method": "lora", "rank": 8, "seed": 3, "max_train_steps": 400, "learning_rate": 1e-4}
    inputs = {"train": recipe, "prior_kind": "images", "prior": "c1a55", "resolution": 512}
    training = {"method": "lora", "inputs": inputs, "class_images": 200, "shipped_step": 350}
    rows = dict(provenance(about, metrics, dataclasses.replace(where, training=training)).rows)
    assert {name: rows[f"train: {name}"] for name in recipe} == {name: str(value) for name, value in recipe.items()}
    assert rows["step that is shipped"] == "350"
    assert rows["class images of the training"] == "200, images, sha256 c1a55"
    other = training | {"inputs": inputs | {"train": recipe | {"seed": 4}, "prior": "07e4"}}
    others = dict(provenance(about, metrics, dataclasses.replace(where, training=other)).rows)
    assert {name for name in rows if rows[name] != others[name]} == {"train: seed", "class images of the training"}


def test_a_large_picture_is_shrunk_and_a_small_one_keeps_its_pixels() -> None:
    small, large = picture_of(make_photo(1, 64), "a"), picture_of(make_photo(1, 960), "a")
    assert small.small
    assert not large.small
    content = base64.b64decode(large.uri.partition(",")[2])
    with Image.open(io.BytesIO(content)) as image:
        assert max(image.size) == 256
    with Image.open(io.BytesIO(base64.b64decode(small.uri.partition(",")[2]))) as image:
        assert image.tobytes() == make_photo(1, 64).tobytes()


def test_the_index_lists_every_subject_with_its_versions(page: Path, tmp_path: Path) -> None:
    for name in ("biscuit", "rex"):
        shutil.copytree(page.parent, tmp_path / name)
    write_index(tmp_path, {"rex": "1, 2 @champion"})
    seen = Seen(tmp_path / "index.html")
    assert [one["href"] for one in seen.all("a")] == ["biscuit/index.html", "rex/index.html"]
    assert "1, 2 @champion" in "".join(seen.text)
    assert seen.all("script") == []


def test_the_index_lists_no_folder_of_a_writer_and_says_none_of_those_that_were_asked_about_alone(
    page: Path, tmp_path: Path
) -> None:
    for name in ("biscuit", "rex", "tom", ".rex.1a2b3c4d"):
        shutil.copytree(page.parent, tmp_path / name)
    found = in_words(tmp_path, ["rex"])
    write_index(tmp_path, found | {"tom": "v1"})
    seen = Seen(tmp_path / "index.html")
    assert [one["href"] for one in seen.all("a")] == [f"{name}/index.html" for name in ("biscuit", "rex", "tom")]
    assert re.findall(r"<td>(\w*)</td></tr>", (tmp_path / "index.html").read_text()) == ["", "none", "v1"]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH; apt-get install chromium")
def test_a_browser_loads_every_picture_and_complains_about_nothing(page: Path, tmp_path: Path) -> None:
    # Chromium writes every console message, refused request and error of the page to its log.
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0", "--hide-scrollbars"]
    own = [f"--user-data-dir={tmp_path}/profile", f"--screenshot={tmp_path}/page.png", "--window-size=390,2400"]
    done = subprocess.run(
        [str(CHROMIUM), *options, *own, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    assert "CONSOLE" not in done.stderr
    with Image.open(tmp_path / "page.png") as shot:
        colours = shot.convert("RGB").getcolors(1 << 24)
    assert colours is not None
    assert len(colours) > 1000  # photos were drawn, not empty frames
    dumped = subprocess.run(
        [str(CHROMIUM), *options[:3], own[0], "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "<title>&lt;script&gt;" in dumped.stdout
