"""What careless and hostile people give to the command: it works, or one line says what is wrong, never a traceback."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from toy_project import REPOSITORY, make_photos, quiet

from flows.add import Wish, add_subject

TOM = ("add", "tom", "CAMERA", "--class-noun", "dog", "--kind", "live")
Arrange = Callable[[Path, Path], object]


def dreambooth(root: Path, *arguments: str, before: tuple[str, ...] = ()) -> "subprocess.CompletedProcess[str]":
    """Run the command for at most a minute, behind another command if one is named."""
    environment = {**quiet(root.parent / "prefect"), "COLUMNS": "200", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [*before, sys.executable, "-m", "flows.cli", *arguments],
        cwd=root, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=60,
        errors="backslashreplace",
    )  # fmt: skip


@pytest.fixture
def camera(tmp_path: Path) -> Path:
    make_photos(tmp_path / "camera", 3, seed=5)
    return tmp_path / "camera"


def rewrite(change: Callable[[bytes], bytes]) -> Arrange:
    return lambda root, _: (root / "params.yaml").write_bytes(change((root / "params.yaml").read_bytes()))


def instead_of_params(make: Callable[[Path], object]) -> Arrange:
    def arrange(root: Path, _: Path) -> None:
        (root / "params.yaml").unlink()
        make(root / "params.yaml")

    return arrange


def everything_strange(root: Path, camera: Path) -> None:
    """A pipe, a folder with the name of a photo, folders in folders, links to nowhere, to itself and to no end."""
    os.mkfifo(camera / "pipe.jpg")
    os.mkfifo(camera / "photo 0.txt")
    (camera / "folder.jpg").mkdir()
    (camera / "photo 1.txt").mkdir()
    make_photos(camera / "more" / "and more", 2)
    (camera / "endless.jpg").symlink_to("/dev/zero")
    (camera / "nowhere.jpg").symlink_to("not there")
    (camera / "itself.jpg").symlink_to("itself.jpg")
    (camera / "photo 2.png").rename(os.fsdecode(os.fsencode(camera) + b"/\xff\xfe.png"))


@pytest.mark.slow
@pytest.mark.fault(2, 10)
@pytest.mark.threat(7, 9)
def test_a_folder_of_everything_strange_gives_its_photos_and_names_the_rest(project: Path, camera: Path) -> None:
    everything_strange(project, camera)
    seen = dreambooth(project, "check", str(camera))
    assert seen.returncode == 0, seen.stderr
    assert "3 of 3 photos can be used" in seen.stdout
    for name in ("pipe.jpg", "folder.jpg", "endless.jpg", "nowhere.jpg", "itself.jpg", "more"):
        assert re.search(rf"{name}\s+passed over", seen.stdout)
    added = dreambooth(project, "add", "tom", str(camera), "--class-noun", "dog")
    assert added.returncode == 0, added.stderr
    kept = project / "data/subjects/tom"
    assert sorted(path.name for path in kept.iterdir()) == ["00.png", "01.png", "02.png"]
    assert all(path.is_file() and not path.is_symlink() for path in kept.iterdir())


@pytest.mark.slow
@pytest.mark.threat(9, 10)
@pytest.mark.parametrize(
    ("arrange", "arguments", "code", "said"),
    [
        (lambda root, _: None, ["check", "x" * 5000], 71, "E_FILE: x+: File name too long; give another path"),
        (lambda root, _: None, ["add", "../tom", "CAMERA", "--class-noun", "dog"], 3, r"E_SUBJECT: '\.\./tom' is not"),
        (lambda root, _: None, ["add", "tom", "/dev/zero", "--class-noun", "dog"], 3, "E_PHOTOS: /dev/zero"),
        (lambda root, camera: os.mkfifo(camera / "p.jpg"), ["check", "CAMERA/p.jpg"], 3, "E_SUBJECT: .*p.jpg is no "),
        (lambda root, _: (root / "build").touch(), ["check", "rex"], 71, "E_FILE: .*Not a directory; something else"),
        (
            lambda root, camera: (camera / "photo 0.txt").write_bytes(b"a photo of {} \xff"),
            [*TOM], 3, "E_PHOTOS: .*photo 0.txt: .*write one line in UTF-8",
        ),
        (lambda root, _: (root / "mlflow.db").write_text("no database " * 99), ["status"], 8, "is not a database"),
        (lambda root, _: (root / "mlflow.db").mkdir(), ["status"], 8, "unable to open database file"),
        (lambda root, _: (root / "dvc.lock").write_bytes(b"\xff\xfe"), ["status"], 9, "'dvc.lock'.*mend it in"),
        (rewrite(lambda text: text.decode().encode("utf-16")), ["status"], 2, "cannot be read.*save it as UTF-8"),
        (rewrite(lambda text: text.replace(b"  ", b"\t")), ["status"], 2, "cannot be read.*indent with spaces"),
        (rewrite(lambda text: text + b"# \0"), ["status"], 2, "E_PARAMS: .*cannot be read: unacceptable character"),
        (rewrite(lambda text: text.replace(b"seed: 0", b"seed: " + b"9" * 5000)), ["status"], 2, "4300 digits"),
        (lambda root, _: None, [*TOM[:-1], "person", "--consent", "/dev/zero"], 3, r"E_CONSENT: .*\(is no file\)"),
        (lambda root, _: os.mkfifo(root / "p"), ["generate", "rex", "--prompts-file", "p"], 9, "p cannot be read"),
        (instead_of_params(os.mkfifo), ["status"], 9, "E_PIPELINE: no dvc.yaml and params.yaml"),
        (instead_of_params(lambda path: path.symlink_to("/dev/zero")), ["status"], 9, "E_PIPELINE: no dvc.yaml"),
    ],
    ids=[
        "long name", "id that is a path", "device", "pipe", "file for a folder", "caption in Latin-1", "no database",
        "folder for the database", "torn dvc.lock", "UTF-16", "tabs", "zero byte", "5000 digits",
        "device for a consent", "pipe for prompts",
        "pipe for params.yaml", "device for params.yaml",
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_one_line(
    project: Path, camera: Path, arrange: Arrange, arguments: list[str], code: int, said: str
) -> None:
    arrange(project, camera)
    done = dreambooth(project, *(argument.replace("CAMERA", str(camera)) for argument in arguments))
    assert done.returncode == code, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert re.search(said, done.stderr)


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf", b"---\n"], ids=["plain", "byte order mark", "document mark"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
def test_lines_are_added_in_the_way_of_the_file(project: Path, camera: Path, start: bytes, end: bytes) -> None:
    rewrite(lambda text: start + text.replace(b"\n", end))(project, camera)
    before = (project / "params.yaml").read_bytes()
    add_subject(project, Wish("tom", "dog", "sks", "live"), [camera])
    after = (project / "params.yaml").read_bytes()
    lines = [f"  tom:{end.decode()}", *(f"    {line}{end.decode()}" for line in ("class_id: dog", "identifier: sks"))]
    added = "".join([*lines, f"    kind: live{end.decode()}"]).encode()
    assert added in after
    assert after.replace(added, b"") == before


def test_a_link_for_params_yaml_stays_one_and_its_file_is_written(project: Path, camera: Path, tmp_path: Path) -> None:
    real = (project / "params.yaml").rename(tmp_path / "shared.yaml")
    (project / "params.yaml").symlink_to(real)
    add_subject(project, Wish("tom", "dog", "sks", "live"), [camera])
    assert (project / "params.yaml").is_symlink()
    assert "tom:" in real.read_text()


@pytest.mark.slow
@pytest.mark.fault(42)
@pytest.mark.parametrize(
    ("closed", "mode", "arguments", "code", "said"),
    [
        (
            "camera/photo 0.png",
            0,
            ["check", "CAMERA"],
            3,
            r"E_PHOTOS: .*photo 0.png: cannot be read \(Permission denied",
        ),
        ("camera/photo 0.png", 0, TOM, 71, "E_PERMISSION: .*photo 0.png: Permission denied; make it readable"),
        ("camera", 0, ["check", "CAMERA"], 71, "E_PERMISSION: .*camera: Permission denied; make it readable"),
        ("camera", 0o400, ["check", "CAMERA"], 71, "E_PERMISSION: .*camera.*: Permission denied; make it readable"),
        ("project", 0o555, ["check", "CAMERA"], 71, "E_PERMISSION: .*scratch: Permission denied; make it readable"),
        ("project/data/subjects", 0o555, TOM, 71, "E_PERMISSION: .*subjects/.*: Permission denied; make it readable"),
        ("project/params.yaml", 0, ["status"], 2, "E_PARAMS: .*params.yaml: cannot be read: .*Permission denied"),
    ],
)
def test_what_may_not_be_read_or_written_is_one_line(
    project: Path, camera: Path, closed: str, mode: int, arguments: list[str], code: int, said: str
) -> None:
    place = {"camera": camera, "project": project}[closed.partition("/")[0]] / closed.partition("/")[2]
    as_others: tuple[str, ...] = ()
    if os.geteuid() == 0:  # root as everybody else: what is closed is closed for it as well
        if shutil.which("setpriv") is None:
            pytest.skip("root reads everything")
        as_others = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
    before = place.stat().st_mode
    place.chmod(mode)
    try:
        given = [argument.replace("CAMERA", str(camera)) for argument in arguments]
        done = dreambooth(project, *given, before=as_others)
    finally:
        place.chmod(before)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert re.search(said, done.stderr), done.stderr
    assert not (project / "data/subjects/tom").exists()
