"""What all flows share: which faults of a server may pass, and how long it is asked again."""

import pytest
from httpx import ConnectError, HTTPStatusError, ReadTimeout, Request, Response
from prefect.states import Completed, Failed

from dreambooth.errors import MACHINE_FAULT, PipelineError
from flows import program
from flows.program import ended, exit_code, failed, is_away, left, patiently, reached

REQUEST = Request("GET", "http://server/api")


def refusal(status: int) -> HTTPStatusError:
    return HTTPStatusError(str(status), request=REQUEST, response=Response(status, request=REQUEST))


AWAY = [ConnectError("refused"), ReadTimeout("late"), refusal(503), RuntimeError("Failed to reach API at http://x")]


@pytest.mark.parametrize("error", AWAY, ids=repr)
def test_a_server_that_is_away_is_asked_again_until_it_answers(error: Exception) -> None:
    faults, waited = [error, error, error], list[float]()

    def ask() -> str:
        if faults:
            raise faults.pop()
        return "answer"

    assert patiently(ask, sleep=waited.append) == "answer"
    assert waited == [1, 2, 4]


@pytest.mark.parametrize("error", [refusal(404), refusal(422), RuntimeError("ours")], ids=repr)
def test_what_will_not_pass_is_raised_at_once(error: Exception) -> None:
    assert not is_away(error)

    def ask() -> str:
        raise error

    with pytest.raises(type(error)):
        patiently(ask, sleep=lambda seconds: pytest.fail("it was waited for"))


def test_patience_with_a_server_ends() -> None:
    waited = list[float]()

    def ask() -> str:
        raise AWAY[0]

    with pytest.raises(ConnectError):
        patiently(ask, patience=60, sleep=waited.append)
    assert sum(waited) >= 60
    assert max(waited) == 30


def test_an_artifact_that_the_server_does_not_take_costs_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, log = [], list[tuple[object, ...]]()

    class Log:
        def warning(self, *words: object) -> None:
            log.append(words)

    def refuse(content: object, key: str, description: str | None) -> None:
        raise refusal(500)

    def take(content: object, key: str, description: str | None) -> None:
        taken.append((content, key, description))

    monkeypatch.setattr(program, "get_run_logger", Log)
    monkeypatch.setattr(program, "pauses", lambda seconds: [0.0])
    left(refuse, "table", "key")
    assert log[0][1] == "key"
    left(take, "table", "key", "words")
    assert taken == [("table", "key", "words")]
    with pytest.raises(HTTPStatusError):
        left(lambda *_, **__: (_ for _ in ()).throw(refusal(422)), "table", "key")  # our own mistake is told


@pytest.mark.parametrize(
    ("status", "remedy"),
    [
        (401, "PREFECT_API_AUTH_STRING as its server has it, or PREFECT_API_KEY"),
        (403, "PREFECT_API_AUTH"),
        (404, "/api"),
    ],
)
def test_a_server_that_refuses_is_a_line_that_names_what_it_would_have(status: int, remedy: str) -> None:
    with pytest.raises(PipelineError) as told, reached():
        raise refusal(status)
    assert str(told.value).startswith(f"{status} (")
    assert remedy in str(told.value)
    assert len(str(told.value).splitlines()) == 1
    with pytest.raises(HTTPStatusError), reached():
        raise refusal(422)  # our own mistake


def test_a_temporary_server_that_is_gone_is_not_called_one_that_an_address_names() -> None:
    with (
        pytest.raises(PipelineError, match=r"\(a temporary server of Prefect\); run it again, or start a server"),
        reached(),
    ):
        raise AWAY[0]


@pytest.mark.threat(17)
def test_a_run_says_the_first_line_of_each_failure_in_a_line_that_a_webhook_carries() -> None:
    done, bad = Completed(), Failed(message="train@rex: E_TRAIN: the loss is NaN\nmore")
    worse = Failed(message="http://somebody:canary@host/store: no such host")
    assert ended([done, done]) == [done, done]
    told = ended([done, bad, worse])
    assert told.message == "train@rex: E_TRAIN: the loss is NaN; http://***@host/store: no such host"
    assert told.data == [done, bad, worse]
    assert len(ended([bad] * 99).message) <= 1000


@pytest.mark.threat(17)
def test_a_password_in_an_address_is_in_no_state_and_on_no_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    error = PipelineError("git clone: http://somebody:canary@host/project.git: no such host")

    def clone() -> list[str]:
        raise error

    assert exit_code(clone) == PipelineError.exit_code
    exit_code(lambda: [str(error)])
    for said in (str(failed(error, "hand back").message), *capsys.readouterr().err.splitlines()):
        assert "http://***@host/project.git" in said
        assert "canary" not in said


def test_what_the_machine_lacks_is_a_line_and_a_fault_of_ours_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def write() -> list[str]:
        raise OSError(28, "No space left on device")

    assert exit_code(write) == MACHINE_FAULT
    assert capsys.readouterr().err.startswith("E_DISK_FULL: the disk: no space left")
    with pytest.raises(RuntimeError, match="ours"):
        exit_code(lambda: (_ for _ in ()).throw(RuntimeError("ours")))
