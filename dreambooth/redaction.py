"""Keep secrets out of everything that is written: those of the environment by value, tokens and passwords by shape."""

import logging
import os
import re
import traceback
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
# Names of environment variables that hold a secret: HF_TOKEN, AWS_SECRET_ACCESS_KEY, MLFLOW_TRACKING_PASSWORD,
# PREFECT_API_KEY, PREFECT_SERVER_API_AUTH_STRING ...
SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSW|API_?KEY|ACCESS_?KEY|CREDENTIAL|AUTH_STRING", re.IGNORECASE)
_MIN_LENGTH = 6  # a shorter value would hide half of every text
_TOKEN = re.compile(  # Hugging Face, GitHub, AWS, Prefect, private keys
    r"\b(?:hf_[A-Za-z0-9]{20,}|gh[opsu]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|AKIA[A-Z0-9]{16}|pn[ub]_[A-Za-z0-9]{20,})\b"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
# user:password@, a / or @ in the password too; http://host:5000/#/models/x@champion is an address with its port.
_USER_INFO = re.compile(
    r"""(?:(?<=http:)|(?<=https:))//[^/@\s:["]*:(?!\d+[/,"\]])[^\s",\]#?]+@(?=[^@\s])"""
    r"""|(?<!http:)(?<!https:)//[^/@\s:["]*:[^\s",\]#?]+@(?=[^@\s])"""
    r"""|//[^/@\s"]+@"""
)


def secrets_of(environment: Mapping[str, str]) -> list[str]:
    """Return the values of the variables whose names say that they are secret, the longest first."""
    values = {value for name, value in environment.items() if SECRET_NAME.search(name) and len(value) >= _MIN_LENGTH}
    paths = {value for value in values if value.startswith("/")}  # a file that holds a secret is none
    return sorted(values - paths, key=len, reverse=True)


def redact(text: str) -> str:
    """Return a text without the secrets of the environment, tokens of known shapes, and users in URIs."""
    for secret in secrets_of(os.environ):
        text = text.replace(secret, HIDDEN)
    return _USER_INFO.sub(f"//{HIDDEN}@", _TOKEN.sub(HIDDEN, text))


def looks_secret(text: str) -> bool:
    """Return whether a text has the shape of a token, or holds a password in a URI, or a secret of the environment."""
    return redact(text) != text


def redact_logs() -> None:
    """Let every log record of this process lose its secrets as it is made, whoever logs and whatever handles it."""
    make = logging.getLogRecordFactory()
    if getattr(make, "redacts", False):
        return

    def redacted(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        try:
            message = record.getMessage()
        except (TypeError, ValueError, KeyError):
            return record  # a mistake of whoever logs: logging tells it
        if (clean := redact(message)) != message:
            record.msg, record.args = clean, ()
        if record.exc_info and record.exc_info[0] is not None:
            record.exc_text = redact("".join(traceback.format_exception(*record.exc_info)).rstrip())
        return record

    redacted.redacts = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(redacted)
