"""Say why something is not to be had from the Hugging Face hub, and what its user does: sign in, look, or wait.

The hub's own client asks again where the hub cannot be reached or is busy (5xx, 429), five times within half a minute,
and takes a no (401, 403, 404) for one. So nothing is asked again here.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from dreambooth.errors import ModelError, first_line

SIGN_IN = "sign in with a token that may read it: HF_TOKEN, or hf auth login"


@contextmanager
def from_hub(repo_id: str, revision: str, what: str, remedy: str) -> Iterator[None]:
    """Turn whatever the hub's client raises into one line that fits.

    Args:
        repo_id: owner/name.
        revision: its commit.
        what: it is called in the line.
        remedy: what helps where the hub cannot be reached.

    Raises:
        ModelError: it is gated, refused, not there, or neither on this machine nor to be had.
        OSError: the disk is full.
    """
    try:
        yield
    except Exception as error:  # the hub raises errors of its own, of its HTTP client, and ValueError
        causes = list(_causes(error))
        for cause in causes:
            if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
                raise cause from None
        told = _no(causes, repo_id, revision, what)
        if told is None:
            told = f"{what} is neither on this machine nor to be had from the hub ({first_line(causes[-1])}); {remedy}"
        raise ModelError(told) from error


def _no(causes: list[BaseException], repo_id: str, revision: str, what: str) -> str | None:
    """Explain what the hub said no to; None if it said nothing."""
    from huggingface_hub import constants, errors

    cause = next((one for one in causes if isinstance(one, errors.HfHubHTTPError)), None)
    status = cause.response.status_code if cause is not None else 500
    page = f"{constants.ENDPOINT}/{repo_id}"
    if isinstance(cause, errors.GatedRepoError):
        return f"{what} is gated ({status}): accept its licence on {page}, then {SIGN_IN}"
    if isinstance(cause, errors.RevisionNotFoundError):
        return f"the hub has no such commit of {repo_id}: {revision}; take one of {page}/commits/main"
    if isinstance(cause, errors.RepositoryNotFoundError):  # 401 as well, where nobody signed in
        return f"the hub shows no {repo_id} ({status}); look at its name on {page}; if it is private, {SIGN_IN}"
    if status in (401, 403):
        return f"the hub refuses {what} ({status}); look at {page}, and {SIGN_IN}"
    if status == 404:
        return f"{what} lacks a file on the hub ({first_line(causes[0])}); take another commit or model: {page}"
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what it came from, as far back as that goes."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__
