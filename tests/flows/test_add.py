import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from toy_project import REPOSITORY, dvc, git, make_photos

from dreambooth.errors import ParamsError, PhotosError, PipelineError, SubjectError
from dreambooth.params import load_params
from dreambooth.photos import find_photos
from dreambooth.vocabulary import SCORER
from flows import commandline
from flows.add import Wish, add_subject, class_of_noun, collect, new_names, track_photos, with_subject
from flows.commandline import child_environment
from flows.graph import Graph

TOM = Wish("tom", "cat", "sks", "live")


def everything(root: Path) -> dict[str, bytes]:
    files = [path for path in root.rglob("*") if path.is_file() and ".dvc" not in path.parts]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def test_a_subject_is_copied_and_written_into_params_and_dvc_knows_its_stages(project: Path, tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "camera", 4)
    added = add_subject(project, TOM, [tmp_path / "camera"])
    assert added.class_id == "cat"
    assert len(list((project / "data" / "subjects" / "tom").iterdir())) == len(photos)
    params = load_params(project / "params.yaml")
    assert params.subject("tom").class_id == "cat"
    assert params.class_of("tom").class_noun == "cat"
    assert "train@tom" in [stage.name for stage in Graph.load(project).stages]


def test_every_other_byte_of_params_stays() -> None:
    text = (REPOSITORY / "params.yaml").read_text()
    params = load_params(REPOSITORY / "params.yaml")
    lines = with_subject(text, params, TOM, "cat").splitlines()
    new = ["  cat:", "    class_noun: cat", "  tom:", "    class_id: cat", "    identifier: sks", "    kind: live"]
    assert [line for line in lines if line not in new] == [line for line in text.splitlines() if line not in new]
    assert lines[lines.index("  tom:") - 1].startswith("    ")
    assert with_subject(text, params, Wish("tom", "dog", "sks", "live"), "dog").count("class_noun: dog") == 1


@pytest.mark.parametrize("empty", ["subjects: {}", "subjects:   { }  # none yet"])
def test_the_first_subject_is_added_to_an_empty_map(empty: str) -> None:
    values = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
    del values["subjects"]
    text = yaml.safe_dump(values, sort_keys=False) + empty + "\n"
    values["subjects"] = {}
    path_params = load_params(REPOSITORY / "params.yaml").model_copy(update={"subjects": {}})
    text = with_subject(text, path_params, TOM, "cat")
    assert yaml.safe_load(text)["subjects"] == {"tom": {"class_id": "cat", "identifier": "sks", "kind": "live"}}


def test_an_indent_of_four_is_kept() -> None:
    values = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
    text = yaml.safe_dump(values, sort_keys=False, indent=4)
    text = with_subject(text, load_params(REPOSITORY / "params.yaml"), TOM, "cat")
    assert "\n    tom:\n" in text


def test_a_params_file_in_one_line_is_left_alone_with_the_line_to_add() -> None:
    text = yaml.safe_dump(yaml.safe_load((REPOSITORY / "params.yaml").read_text()), default_flow_style=True)
    with pytest.raises(Exception, match="add"):
        with_subject(text, load_params(REPOSITORY / "params.yaml"), TOM, "cat")


def test_too_few_photos_leave_nothing_behind(project: Path, tmp_path: Path) -> None:
    make_photos(tmp_path / "camera", 2)
    before = everything(project)
    with pytest.raises(PhotosError, match=r"camera has 2 usable photos .* fewer than 3"):
        add_subject(project, TOM, [tmp_path / "camera"])
    assert everything(project) == before


@pytest.mark.threat(1)
@pytest.mark.parametrize("limit", ["max_count", "max_total_bytes"])
def test_too_many_photos_or_bytes_are_refused_before_one_is_copied(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    make_photos(tmp_path / "camera", 3)
    values = yaml.safe_load((project / "params.yaml").read_text())
    values["photos"] |= {"min_count": 2, limit: 2 if limit == "max_count" else 1024}
    with (tmp_path / "camera/large.jpg").open("wb") as file:
        file.truncate(10**12)  # a whole disk, named by mistake: no file system for tests holds its copy
    (project / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    monkeypatch.setattr("shutil.copyfile", lambda *_: pytest.fail("copied"))
    before = everything(project)
    with pytest.raises(PhotosError, match=rf"camera has .* more than photos\.{limit} "):
        add_subject(project, TOM, [tmp_path / "camera"])
    assert everything(project) == before


def test_a_photo_that_is_none_is_named_where_the_user_has_it(project: Path, tmp_path: Path) -> None:
    make_photos(tmp_path / "camera", 3)
    (tmp_path / "camera" / "my torn.jpg").write_bytes(b"\xff\xd8\xff")
    before = everything(project)
    with pytest.raises(PhotosError, match=r"camera/my torn\.jpg: "):
        add_subject(project, TOM, [tmp_path / "camera"])
    assert everything(project) == before


def test_an_entry_that_would_not_be_valid_leaves_nothing_behind(project: Path, tmp_path: Path) -> None:
    make_photos(tmp_path / "camera", 3)
    before = everything(project)
    with pytest.raises(ParamsError, match=r"identifier: 'cat' is the class noun itself"):
        add_subject(project, Wish("tom", "cat", "cat", "live"), [tmp_path / "camera"])
    assert everything(project) == before


@pytest.mark.fault(19)
def test_a_disk_that_fails_at_the_last_write_leaves_nothing_behind(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flows.project.write_file", full)
    make_photos(tmp_path / "camera", 3)
    before = everything(project)
    with pytest.raises(OSError, match="No space"):
        add_subject(project, TOM, [tmp_path / "camera"])
    with pytest.raises(OSError, match="No space"):
        add_subject(project, Wish("rex", "dog", "sks", "live"), [tmp_path / "camera"], force=True)
    assert everything(project) == before


def test_a_subject_that_exists_is_refused_with_the_next_step_and_replaced_by_force(
    project: Path, tmp_path: Path
) -> None:
    make_photos(tmp_path / "camera", 5, seed=3)
    wish = Wish("rex", "dog", "sks", "live")
    with pytest.raises(SubjectError, match=r"'rex' is there already.*dreambooth run rex.*--force"):
        add_subject(project, wish, [tmp_path / "camera"])
    params = (project / "params.yaml").read_bytes()
    add_subject(project, wish, [tmp_path / "camera"], force=True)
    assert len(list((project / "data" / "subjects" / "rex").iterdir())) == 5
    assert (project / "params.yaml").read_bytes() == params


def add_again(root: Path, camera: Path, wish: Wish) -> None:
    make_photos(camera, 4, seed=3)
    add_subject(root, wish, [camera], force=True)


def test_what_is_unsaid_of_a_subject_that_exists_is_as_its_entry_says(project: Path, tmp_path: Path) -> None:
    text = (project / "params.yaml").read_text().replace("identifier: sks", "identifier: zwx")
    (project / "params.yaml").write_text(text)
    add_again(project, tmp_path / "camera", Wish("rex", "dog"))
    assert (project / "params.yaml").read_text() == text
    assert len(list((project / "data" / "subjects" / "rex").iterdir())) == 4


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        (Wish("rex", "dog", kind="object"), "params.yaml: subjects.rex.kind: is live, not object; change it there, or"),
        (Wish("rex", "dog", "zwx"), "params.yaml: subjects.rex.identifier: is sks, not zwx; change it there, or leave"),
        (
            Wish("rex", "cat"),
            "params.yaml: subjects.rex: its class noun is dog, not cat; say --class-noun 'dog', or if "
            "that is wrong, change subjects.rex.class_id there",  # biscuit is a dog too
        ),
    ],
)
def test_what_contradicts_an_entry_is_named_with_its_option(
    project: Path, tmp_path: Path, wish: Wish, message: str
) -> None:
    before = everything(project)
    with pytest.raises(ParamsError) as caught:
        add_again(project, tmp_path / "camera", wish)
    (problem,) = caught.value.problems
    assert problem.startswith(message)
    assert everything(project) == before


def test_a_class_noun_that_was_mistyped_is_told_with_the_word_it_may_be_and_set_right_where_the_message_says(
    project: Path, tmp_path: Path
) -> None:
    shutil.copytree(REPOSITORY / SCORER, project / SCORER)
    make_photos(tmp_path / "camera", 3)
    added = add_subject(project, Wish("wick", "candel"), [tmp_path / "camera"])
    (remark,) = [one for one in added.remarks if "scorer" in one]
    assert remark.endswith("; did you mean 'candle'? then change the class_noun in params.yaml")
    with pytest.raises(ParamsError, match=r"'candel', or if that is wrong, change classes\.candel\.class_noun there$"):
        add_again(project, tmp_path / "camera", Wish("wick", "candle"))
    text = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(text.replace("class_noun: candel", "class_noun: candle"))
    again = add_subject(project, Wish("wick", "candle"), [tmp_path / "camera"], force=True)
    assert not [one for one in again.remarks if "scorer" in one]


def test_the_kind_of_a_new_subject_is_said_to_be_assumed_and_of_an_old_one_it_is_not(
    project: Path, tmp_path: Path
) -> None:
    make_photos(tmp_path / "camera", 4)
    assert add_subject(project, Wish("tom", "cat"), [tmp_path / "camera"]).assumed_kind
    assert load_params(project / "params.yaml").subject("tom").kind == "object"
    assert not add_subject(project, Wish("rex", "dog"), [tmp_path / "camera"], force=True).assumed_kind


def test_a_folder_without_an_entry_is_not_overwritten(project: Path, tmp_path: Path) -> None:
    make_photos(project / "data" / "subjects" / "tom", 3)
    make_photos(tmp_path / "camera", 3)
    with pytest.raises(SubjectError, match=r"is there already, but params\.yaml has no subject 'tom'"):
        add_subject(project, TOM, [tmp_path / "camera"])
    add_subject(project, TOM, [project / "data" / "subjects" / "tom"], force=True)
    assert load_params(project / "params.yaml").subject("tom")


@pytest.mark.parametrize("bad", ["../../etc", "/tmp/x", "", "Tom", "-tom", "a b", "x" * 42, "dog; touch X #"])
def test_an_id_that_is_no_id_is_refused(project: Path, tmp_path: Path, bad: str) -> None:
    make_photos(tmp_path / "camera", 3)
    with pytest.raises(SubjectError, match="is not an id"):
        add_subject(project, Wish(bad, "cat", "sks", "live"), [tmp_path / "camera"])


def test_junk_is_passed_over_and_named(tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "camera", 3)
    for name in (".DS_Store", "Thumbs.db", "captions.txt"):
        (tmp_path / "camera" / name).touch()
    found, ignored = collect([tmp_path / "camera"])
    assert (found, ignored) == (photos, [".DS_Store", "Thumbs.db", "captions.txt"])
    found, ignored = collect(sorted((tmp_path / "camera").iterdir()))
    assert (found, ignored) == (photos, [".DS_Store", "Thumbs.db", "captions.txt"])


@pytest.mark.parametrize("is_source", [True, False])
def test_a_folder_that_holds_more_than_photos_is_not_replaced_and_what_would_be_lost_is_named(
    project: Path, tmp_path: Path, is_source: bool
) -> None:
    folder, wish = project / "data/subjects/rex", Wish("rex", "dog", "sks", "live")
    make_photos(tmp_path / "camera", 3, seed=5)
    (folder / "raw").mkdir()
    (folder / "raw/original.tif").touch()
    (folder / "notes.md").touch()
    (folder / "photo 0.txt").write_text("a photo of {} in a park")
    (folder / ".DS_Store").touch()
    before = everything(project)
    with pytest.raises(SubjectError, match=r"rex holds .* would be lost: notes\.md, raw; move it elsewhere first"):
        add_subject(project, wish, [folder if is_source else tmp_path / "camera"], force=True)
    assert everything(project) == before
    shutil.rmtree(folder / "raw")
    (folder / "notes.md").unlink()
    add_subject(project, wish, [folder if is_source else tmp_path / "camera"], force=True)
    assert len(list(folder.glob("*.txt"))) == is_source


def test_an_archive_is_to_be_unpacked(tmp_path: Path) -> None:
    (tmp_path / "photos.zip").touch()
    with pytest.raises(PhotosError, match=r"photos\.zip is an archive; unpack it") as caught:
        collect([tmp_path / "photos.zip"])
    assert len(caught.value.problems) == 1
    photos = make_photos(tmp_path / "camera", 1)
    assert collect([*photos, tmp_path / "photos.zip"]) == (photos, ["photos.zip"])


def test_captions_come_along_under_the_names_of_their_photos(project: Path, tmp_path: Path) -> None:
    make_photos(tmp_path / "camera", 3)
    (tmp_path / "camera" / "photo 0.txt").write_text("a photo of {} in a park")
    added = add_subject(project, Wish("tom", "cat", "sks", "live"), sorted((tmp_path / "camera").iterdir()))
    assert added.ignored == []
    texts = list(added.folder.glob("*.txt"))
    assert [text.read_text() for text in texts] == ["a photo of {} in a park"]
    assert texts[0].with_suffix(".png").exists()


def test_photos_of_two_folders_keep_their_own_captions(project: Path, tmp_path: Path) -> None:
    for number, folder in enumerate(("x", "y")):
        for index, photo in enumerate(make_photos(tmp_path / folder, 2, seed=4 * number)):
            with Image.open(photo) as picture:
                picture.save(tmp_path / folder / f"{index}.{'jpg' if number else 'png'}")
            photo.unlink()
    for name, caption in {"x/0": "a photo of {} X0", "x/1": "a photo of {} X1", "y/0": "a photo of {} Y0"}.items():
        (tmp_path / name).with_suffix(".txt").write_text(caption)
    folders = [tmp_path / "x", tmp_path / "y"]
    names = new_names(collect(folders)[0])
    captions = find_photos(add_subject(project, TOM, folders).folder).captions
    assert [captions[name].read_text()[-2:] if name in captions else None for name in names] == ["X0", "X1", "Y0", None]


def test_photos_that_share_a_caption_keep_their_names_and_a_new_name_takes_nobody_s_caption() -> None:
    assert new_names([Path("x/a.png"), Path("x/a.jpg"), Path("y/a.webp")]) == ["a.png", "a.jpg", "02.webp"]
    assert new_names([Path("x/é.png"), Path("x/00.jpg"), Path("x/00.png")]) == ["00.png", "01.jpg", "02.png"]


def test_a_caption_without_the_subject_leaves_nothing_behind(project: Path, tmp_path: Path) -> None:
    make_photos(tmp_path / "camera", 3)
    (tmp_path / "camera" / "photo 0.txt").write_text("a dog in a park")
    with pytest.raises(PhotosError, match=r"photo 0\.txt: the caption"):
        add_subject(project, Wish("tom", "cat", "sks", "live"), [tmp_path / "camera"])
    assert not (project / "data/subjects/tom").exists()


def test_a_caption_of_which_the_base_reads_no_subject_leaves_nothing_behind(project: Path, tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "data/base/emoji64/tokenizer", project / "data/base/emoji64/tokenizer")
    make_photos(tmp_path / "camera", 3)
    caption, long = tmp_path / "camera" / "photo 0.txt", "a red wall behind a table, " * 5
    caption.write_text(f"a photo of {long}{{}}")
    with pytest.raises(PhotosError, match=r"photo 0\.txt: 'sks cat' ends at token \d+, and the base reads 30"):
        add_subject(project, TOM, [tmp_path / "camera"])
    assert not (project / "data/subjects/tom").exists()
    caption.write_text(f"a photo of {{}} and {long}")
    assert any("photo 0.txt: has" in remark for remark in add_subject(project, TOM, [tmp_path / "camera"]).remarks)


def test_every_missing_source_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(PhotosError) as caught:
        collect([tmp_path / "a.jpg", tmp_path / "b.jpg"])
    assert len(caught.value.problems) == 2


@pytest.mark.fault(10)
def test_names_are_kept_if_they_are_safe_and_numbered_if_not() -> None:
    given = ["a.jpg", "x/A.JPG", "-rf.png", "$(touch x).png", "día.jpeg", "a b.webp", "05.webp", "n" * 200 + ".png"]
    names = new_names([Path(name) for name in given])
    assert names == ["a.jpg", "01.jpg", "02.png", "03.png", "04.jpeg", "05.webp", "06.webp", "07.png"][:6] + names[6:]
    assert len({name.lower() for name in names}) == len(names)
    assert all(name.isascii() and not name.startswith("-") and " " not in name for name in names)


def test_a_class_is_reused_by_its_noun_and_made_of_it_otherwise(project: Path) -> None:
    params = load_params(project / "params.yaml")
    assert class_of_noun(params, "Dog") == "dog"
    assert class_of_noun(params, "tea pot") == "tea-pot"
    assert class_of_noun(params, "dog!") == "dog-2"
    assert class_of_noun(params, "犬") == "class"


def test_dvc_gives_the_photos_a_version_or_says_why_not(project: Path, tmp_path: Path) -> None:
    assert track_photos(project, project / "data" / "subjects" / "rex") is None
    assert (project / "data" / "subjects" / "rex.dvc").exists()
    dvc(project, "status")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    reason = track_photos(elsewhere, elsewhere / "photos")
    assert reason is not None
    assert "dvc init" in reason
    shutil.copytree(project / "data/subjects/rex", elsewhere / "photos")
    (elsewhere / ".dvc").mkdir()
    (elsewhere / ".dvc/config").touch()  # of a project that was in git
    reason = track_photos(elsewhere, elsewhere / "photos")
    assert reason == f"the photos have no versions: {elsewhere} is no git repository; git init, then dvc add photos"


def test_photos_without_a_version_are_told_with_all_that_dvc_says_of_it(project: Path) -> None:
    git(project, "init", "--quiet")
    dvc(project, "config", "--unset", "core.no_scm")
    git(project, "add", "--force", "data/subjects/rex")
    reason = track_photos(project, project / "data/subjects/rex")
    assert reason is not None
    assert "is already tracked by SCM" in reason
    assert "git rm -r --cached 'data/subjects/rex'" in reason
    with pytest.raises(PipelineError) as refused:
        commandline.dvc(project, "add", "data/subjects/rex")
    assert str(refused.value).partition(": ")[2].partition("; mend that")[0] in reason


def test_photos_get_their_version_when_another_command_of_dvc_is_done(project: Path) -> None:
    program = "import sys, time\nfrom dvc.repo import Repo\nwith Repo().lock: print('held', flush=True); time.sleep(5)"
    command = [sys.executable, "-c", program]
    with subprocess.Popen(
        command, cwd=project, env=child_environment(project), stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        assert track_photos(project, project / "data/subjects/rex") is None
        assert other.wait() == 0
