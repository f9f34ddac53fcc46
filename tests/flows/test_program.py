"""What all flows share: which faults of a server may pass, and how long it is asked again."""

import pytest
from httpx import ConnectError, HTTPStatusError, ReadTimeout, Request, Response

from flows.program import is_away, patiently

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
