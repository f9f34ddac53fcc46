"""What no file of the project may do, and what the project's own settings must say."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_project import REPOSITORY, add_photos

from dreambooth import mlflowstore  # noqa: F401 - sets what MLflow may do
from dreambooth.errors import EvaluationError, ModelError, ParamsError, PipelineError
from dreambooth.folders import (
    TornFolderError,
    cache_folder,
    is_private,
    read_manifest,
    scratch_folder,
    sha256_of,
    write_manifest,
)
from dreambooth.images import read_prepared
from dreambooth.models import check_model_folder
from dreambooth.params import load_params, parse_params
from dreambooth.pointer import require_beside, resolve
from dreambooth.prompts import load_templates
from flows.clones import cloned
from flows.doctor import _scratch
from stages import validate

CODE = sorted(path for folder in ("dreambooth", "stages", "flows") for path in (REPOSITORY / folder).rglob("*.py"))
WORKFLOWS = sorted((REPOSITORY / ".github/workflows").glob("*.yml"))


def calls(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]


def name_of(call: ast.Call) -> str:
    return ast.unparse(call.func)


def keywords(call: ast.Call) -> dict[str, str]:
    return {word.arg: ast.unparse(word.value) for word in call.keywords if word.arg}


@pytest.mark.threat(2)
def test_every_picture_is_opened_with_a_list_of_formats() -> None:
    opened = [(path.name, keywords(call)) for path in CODE for call in calls(path) if name_of(call) == "Image.open"]
    assert len(opened) > 3
    assert [name for name, given in opened if "formats" not in given] == []
    foreign = {given["formats"] for name, given in opened if name != "images.py"}
    assert {re.sub(r"\W", "", formats) for formats in foreign} == {"PNG"}  # all but photos are pictures of our own


def is_list(command: ast.expr, path: Path) -> bool:
    """Tell whether a command is a list, or a name that its file gives to lists alone."""
    if isinstance(command, ast.List):
        return True
    if not isinstance(command, ast.Name):
        return False
    given = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Assign) and command.id in map(ast.unparse, node.targets):
            given.append(isinstance(node.value, ast.List))
        if isinstance(node, ast.arg) and node.arg == command.id and node.annotation is not None:
            given.append(ast.unparse(node.annotation) in ("list[str]", "Sequence[str]"))
    return bool(given) and all(given)


@pytest.mark.threat(8)
def test_no_shell_is_started_and_no_text_is_run() -> None:
    forbidden = {"eval", "exec", "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}
    for path in CODE:
        for call in calls(path):
            assert name_of(call) not in forbidden, path
            assert keywords(call).get("shell", "False") == "False", path
            if name_of(call) in ("subprocess.run", "subprocess.Popen"):
                assert is_list(call.args[0], path), f"{path}: a command is a list"


@pytest.mark.threat(8)
@pytest.mark.parametrize("revision", ["--orphan=x", "-"])
def test_a_revision_that_git_would_take_for_an_option_is_refused_before_anything_is_cloned(
    tmp_path: Path, revision: str
) -> None:
    with pytest.raises(PipelineError, match=f"revision: {revision} begins with -"), cloned(tmp_path, "x", revision):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.threat(11, 13)
def test_nothing_is_unpickled_and_no_code_of_others_is_asked_for() -> None:
    for path in CODE:
        text = path.read_text()
        assert not re.search(r"\b(pickle|cloudpickle|dill|joblib|marshal)\.(loads?|Unpickler)\b|shelve\.open", text), (
            path
        )
        assert not re.search(r"trust_remote_code\s*=|custom_pipeline\s*=", text), path
        for call in calls(path):
            if name_of(call) == "torch.load":
                assert keywords(call).get("weights_only") == "True", path


@pytest.mark.threat(11)
def test_weights_are_loaded_from_safetensors_but_for_two_encoders_whose_pickles_are_read_as_weights_only() -> None:
    """A function that is handed on to be called elsewhere, `_load(ViTModel.from_pretrained, ...)`, is one as well."""
    pickled = set()
    for path in CODE:
        used = [
            (ast.unparse(node), keywords(call))
            for call in calls(path)
            for node in (call.func, *call.args, *(word.value for word in call.keywords))
            if isinstance(node, ast.Attribute) and node.attr == "from_pretrained"
        ]
        named = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
        assert len(used) == sum(node.attr == "from_pretrained" for node in named), f"{path}: kept to be called later"
        for loader, given in used:
            if "Tokenizer" not in loader and given.get("use_safetensors") != "True":
                assert given.get("weights_only") == "True", f"{path}: {loader}"
                pickled.add((path.name, loader))
    assert pickled == {("hub_encoders.py", f"{kind}.from_pretrained") for kind in ("ViTModel", "CLIPModel")}


@pytest.mark.threat(11)
def test_no_result_of_a_flow_is_stored_and_mlflow_may_unpickle_nothing() -> None:
    """Prefect stores results as pickles, where it stores them."""
    decorators = [
        (path.name, ast.unparse(one))
        for path in CODE
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
        for one in node.decorator_list
        if ast.unparse(one).partition("(")[0] in ("flow", "task")
    ]
    assert len(decorators) > 5
    assert [one for one in decorators if "persist_result=False" not in one[1]] == []
    assert os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"  # since dreambooth.mlflowstore was imported


@pytest.mark.threat(11, 13)
@pytest.mark.parametrize("name", ["unet/pytorch_model.bin", "vae/x.ckpt", "extra/model.pt", "m.pkl", "handler.py"])
def test_a_model_folder_with_a_pickle_or_code_beside_its_weights_is_refused(
    tiny_model_folder: Path, tmp_path: Path, name: str
) -> None:
    folder = Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))
    check_model_folder(folder)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match=Path(name).name):
        check_model_folder(folder)


@pytest.mark.threat(25)
def test_folders_of_caches_and_work_are_for_their_owner_also_if_they_were_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = os.umask(0)
    try:
        monkeypatch.setenv("DREAMBOOTH_CACHE", str(tmp_path / "a/cache"))
        for folder in (scratch_folder(tmp_path / "project"), cache_folder()):
            assert folder.stat().st_mode & 0o777 == 0o700
        (tmp_path / "project/.scratch").chmod(0o777)
        assert is_private(scratch_folder(tmp_path / "project"))
        (tmp_path / "shared").mkdir(mode=0o777)
        monkeypatch.setenv("DREAMBOOTH_SCRATCH", str(tmp_path / "shared"))
        assert not is_private(scratch_folder(tmp_path))  # named by the user: left alone, and doctor warns
        assert any("others may look into" in found.found for found in _scratch(tmp_path, None))
    finally:
        os.umask(before)


@pytest.mark.fault(42)
@pytest.mark.threat(25)
def test_a_path_with_spaces_no_home_and_a_closed_umask_work(tmp_path: Path, params_values: dict[str, Any]) -> None:
    root = tmp_path / "a project; with (odd) 'name' é"
    add_photos(root / "data/subjects/biscuit", 3)
    (root / "params.yaml").write_text(yaml.safe_dump(params_values, sort_keys=False))
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY)}
    program = "import os, sys; os.umask(0o077); sys.argv = ['validate', 'biscuit']; import runpy; "
    program += "runpy.run_module('stages.validate', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert all(path.stat().st_mode & 0o077 == 0 for path in (root / "build").rglob("*"))


@pytest.mark.fault(42)
def test_photos_that_may_only_be_read_are_enough(project: Path) -> None:
    folder = project / "data/subjects/biscuit"
    for path in folder.iterdir():
        path.chmod(0o444)
    folder.chmod(0o555)
    try:
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        validate.run(load_params(project / "params.yaml"), "biscuit", project)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    finally:
        folder.chmod(0o755)


@pytest.mark.threat(19, 20)
def test_actions_are_pinned_and_a_job_installs_without_constraints() -> None:
    text = "".join(path.read_text() for path in WORKFLOWS)
    used = re.findall(r"uses:\s*(\S+)", text)
    assert used
    assert [one for one in used if not re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", one)] == []
    jobs = {name: job for path in WORKFLOWS for name, job in yaml.safe_load(path.read_text())["jobs"].items()}
    commands = {name: " ".join(step.get("run", "") for step in job["steps"]) for name, job in jobs.items()}
    assert "make check" in commands["check"]
    assert "make test" in commands["test"]
    assert "pip install --editable" in commands["newest"]
    assert "constraint" not in commands["newest"]
    assert "pip_audit --strict --requirement constraints.txt" in commands["audit"]
    assert all(yaml.safe_load(path.read_text())["permissions"] == {"contents": "read"} for path in WORKFLOWS)
    assert "pull_request_target" not in text


@pytest.mark.threat(15, 16)
def test_servers_and_their_passwords_are_documented() -> None:
    told = (REPOSITORY / "SECURITY.md").read_text()
    for word in ("--host 127.0.0.1", "basic-auth", "--allowed-hosts", "PREFECT_SERVER_API_AUTH_STRING", "TLS"):
        assert word in told


@pytest.mark.threat(14)
def test_a_base_of_the_project_has_no_revision_and_one_of_the_hub_needs_forty_digits(
    params_values: dict[str, Any],
) -> None:
    params_values["base"]["revision"] = "main"
    with pytest.raises(ParamsError, match=r"base\.revision"):
        parse_params(params_values)
    params_values["base"]["revision"] = "a" * 40
    assert parse_params(params_values).base.revision == "a" * 40


@pytest.mark.threat(18)
def test_a_table_for_spreadsheets_holds_no_formula(tmp_path: Path) -> None:
    """A cell that begins with = + - or @ is run by spreadsheets; prompts stand in scores.csv and prompts.csv."""
    lines = [f'recontextualisation,"{start}HYPERLINK(1) {{}}"' for start in "=+-@"]
    (tmp_path / "live.csv").write_text("\n".join(["kind,prompt", *lines]) + "\n")
    with pytest.raises(EvaluationError, match="begins with"):
        load_templates(tmp_path / "live.csv")


@pytest.mark.threat(6, 12)
@pytest.mark.parametrize("name", ["../../secret.png", "/etc/hostname", "00.png/../../../secret.png"])
def test_a_manifest_that_names_a_picture_elsewhere_is_refused(project: Path, name: str) -> None:
    """Whoever can write a manifest can make its hash right as well; the names still have to be those of the folder."""
    validate.run(load_params(project / "params.yaml"), "biscuit", project)
    folder = project / "build/biscuit/instance"
    shutil.copy(folder / "00.png", project / "build/secret.png")
    about = read_manifest(folder)
    about["photos"][0]["file"] = name
    write_manifest(folder, about)
    with pytest.raises(TornFolderError, match=r"is not in the manifest; run validate again"):
        list(read_prepared(folder))
    about["files"][name] = about["files"]["00.png"]
    about.pop("sha256", None)
    (folder / "manifest.json").write_text(json.dumps({**about, "sha256": sha256_of(about)}))
    with pytest.raises(TornFolderError, match=r"secret.png is missing|hostname is missing"):
        list(read_prepared(folder))


@pytest.mark.threat(6, 12)
@pytest.mark.parametrize(
    ("pointer", "entry"),
    [
        ({"hash": "../../../precious"}, {}),
        ({"hash": 7}, {}),
        ({"md5": "../../precious"}, {}),
        ({}, {"relpath": "../../../precious/planted"}),
        ({}, {"relpath": "/tmp/planted"}),
        ({}, {"md5": "../../../../precious/file"}),
    ],
)
def test_a_pointer_of_a_strange_registry_leads_to_no_other_folder(
    tmp_path: Path, pointer: dict[str, Any], entry: dict[str, str]
) -> None:
    """Hashes become names of folders, which are replaced, and the names in a folder of DVC become links."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("precious")
    root, objects = tmp_path / "project", tmp_path / "project/.dvc/cache/files/md5/aa"
    objects.mkdir(parents=True)
    (objects / f"{'a' * 30}.dir").write_text(json.dumps([{"md5": "b" * 32, "relpath": "unet/x", **entry}]))
    about = {"root": str(root), "path": "export/biscuit", "hash": "c" * 64, "md5": f"{'a' * 32}.dir", **pointer}
    (tmp_path / "pointer.json").write_text(json.dumps(about))
    with pytest.raises(ModelError, match=r"is no pointer to an export|does not hold the export"):
        resolve(tmp_path)
    assert [path.name for path in precious.iterdir()] == ["file"]
    assert not Path("/tmp/planted").is_symlink()
    assert not [path for path in root.rglob("*") if path.is_symlink()]


@pytest.mark.threat(12)
@pytest.mark.parametrize(
    "beside",
    [{"../precious": {"size": 8, "sha256": "0"}}, {"/etc/hostname": {"size": 8, "sha256": "0"}}, {"x": {}}, ["x"]],
)
def test_a_pointer_of_a_strange_registry_names_no_file_beside_its_folder(tmp_path: Path, beside: Any) -> None:
    about = {"root": str(tmp_path), "path": "export/biscuit", "hash": "c" * 64, "md5": None, "beside": beside}
    (tmp_path / "pointer.json").write_text(json.dumps(about))
    with pytest.raises(ModelError, match="is no pointer to an export"):
        require_beside(tmp_path)
