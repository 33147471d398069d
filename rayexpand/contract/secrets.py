"""Passwords of URLs and tokens: out of everything that is shown, and refused where files would keep them.

What a run is made from is written into its folder, on its page and into the cluster's logs. So a secret does not belong
into a job file; storage libraries take it from the environment.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TextIO

_HIDDEN = "***"
_PATTERNS = (  # (where a secret stands, what is shown)
    (re.compile(r"(?<=://)[^/\s'\"@]*:[^/\s'\"]*@"), f"{_HIDDEN}@"),
    (re.compile(r"((?:https?|s3|gs|gcs)://)[^/\s'\":@]+@"), rf"\1{_HIDDEN}@"),
    (re.compile(r"([?&](?:x-(?:amz|goog)-(?:signature|credential|security-token)|signature|sig|"
                r"(?:\w+[_-])?(?:token|secret|password|passwd|pwd)|api[_-]?key|key)=)[^&\s'\"#]+", re.IGNORECASE),
     rf"\1{_HIDDEN}"),
    (re.compile(r"\b(Bearer )(?=\S*\d)[\w.~+/-]{12,}=*"), rf"\1{_HIDDEN}"),
    (re.compile(r"\b(?:hf_|gh[opsu]_|github_pat_)\w{16,}"), _HIDDEN))


def masked(text: str) -> str:
    """The text with passwords of URLs, signatures and tokens hidden."""
    for pattern, shown in _PATTERNS:
        text = pattern.sub(shown, text)
    return text


def secret_problems(value: Any, field: str = "") -> list[str]:
    """One line for each string of a configuration that holds a secret, by its dotted field."""
    if isinstance(value, Mapping):
        return [line for name, one in value.items() for line in secret_problems(one, f"{field}.{name}".lstrip("."))]
    if isinstance(value, (list, tuple)):
        return [line for i, one in enumerate(value) for line in secret_problems(one, f"{field}.{i}")]
    if not isinstance(value, str) or (shown := masked(value)) == value:
        return []
    return [f"{field}: holds a password or token ({shown}), which would be kept in files, pages and logs. Take it out, "
            "and give it to the storage library in the environment: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "GOOGLE_APPLICATION_CREDENTIALS, or FSSPEC_<PROTOCOL>_<OPTION> such as FSSPEC_FTP_PASSWORD"]


class MaskedStream:
    """A stream of text that hides secrets in what is written."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(masked(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def masked_output(out: TextIO, err: TextIO) -> Iterator[None]:
    """What this process prints and logs to stdout and stderr inside shows no secret."""
    streams: Any = (MaskedStream(out), MaskedStream(err))
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        yield
