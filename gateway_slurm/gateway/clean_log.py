"""What the gateway's log shows: no secret, no character that controls a terminal, and no flood by a stranger.

All records pass here, those of tornado, jupyter_server and other libraries too: what they log may come from a peer.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterable
from typing import Any, Final

from gateway_slurm._util import RatedLog, printable

HIDDEN: Final = "[secret]"
MAX_TEXT: Final = 64 << 10
"""Characters of one record; of a longer one the log has the beginning."""
_SEPARATOR: Final = r"""(?:["'\s:=\\]|%3[dDaA]|%20|%22){1,8}"""
# Each with the part that stays. A token in a URL may be percent-encoded; headers may be in JSON or in Python's repr.
_SECRETS: Final = (
    re.compile(r"""(?i)(\b(?:set-)?cookie["']?\s?[:=])[^"\n}\]]{4,}"""),
    re.compile(r"(\bgws_[0-9a-f]{12}_)[A-Za-z0-9_-]{16,}"),
    re.compile(
        rf"(?i)(\b(?:proxy-)?authorization{_SEPARATOR}(?:(?:token|bearer|basic)(?:\s|%20)+)?)"
        r"(?!(?:token|bearer|basic)\b)[A-Za-z0-9._~+/=%|:-]{2,}"
    ),
    re.compile(r"(?i)(\b(?:bearer|token)(?:\s|%20)+)(?=[A-Za-z0-9._~+/-]*[0-9_])[A-Za-z0-9._~+/-]{20,}=*"),
    re.compile(rf"(?i)((?:\b|_)(?:token|_xsrf|password|passwd|api_key){_SEPARATOR})[^\s\"',;&\\}}\[]{{8,}}"),
)


def without_secrets(text: str) -> str:
    """The text with ``[secret]`` in place of tokens, passwords, cookies and values of Authorization."""
    for pattern in _SECRETS:
        text = pattern.sub(rf"\1{HIDDEN}", text)
    return text


def clean(text: str) -> str:
    """The text as the log may show it."""
    more = f" … ({len(text) - MAX_TEXT} more characters)" if len(text) > MAX_TEXT else ""
    # A secret that crosses the end is taken out as well.
    return printable(without_secrets(text[: MAX_TEXT + 8192])[:MAX_TEXT]) + more


class CleanFormatter(logging.Formatter):
    """Formats as ``inner`` does, what is clean."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self.inner = inner

    def format(self, record: logging.LogRecord) -> str:
        """The record's text. One whose arguments do not fit it is shown as it is: a log must not raise."""
        shown = copy.copy(record)
        try:
            text = record.getMessage()
        except (TypeError, ValueError, KeyError):
            text = f"{record.msg!r} {record.args!r}"
        shown.msg, shown.args = clean(text), ()
        if record.exc_info:
            shown.exc_text = clean(record.exc_text or self.inner.formatException(record.exc_info))
        return self.inner.format(shown)


class RateFilter(logging.Filter):
    """Rates the lines of one logger that begin as ``beginnings``, which any peer can cause: they are one peer's."""

    def __init__(self, logger: logging.Logger, beginnings: Iterable[str]) -> None:
        super().__init__()
        self._beginnings = tuple(beginnings)
        self._rated = RatedLog(logger)

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is logged."""
        return not str(record.msg).startswith(self._beginnings) or self._rated.takes(record.levelno)


# What tornado logs of a peer that speaks no HTTP, or ends its connection: any of these, without end.
_OF_STRANGERS: Final = {
    "tornado.general": ("Malformed HTTP", "Unsatisfiable", "Invalid", "Could not", "Cannot", "SSL Error", "Error"),
    "tornado.application": ("Uncaught exception", "Future exception", "Exception in callback"),
    "asyncio": ("socket.accept() out of system resource", "Fatal", "SSL"),
}


def keep_clean(log: Any) -> Callable[[], None]:
    """Clean what this log's handlers write, and what Python writes of a logger that has none. Returns the undoing."""
    undo: list[Callable[[], object]] = []
    handlers: list[logging.Handler] = list(getattr(log, "logger", log).handlers)
    for handler in [*handlers, *logging.getLogger().handlers, logging.lastResort]:
        if handler is not None and not isinstance(handler.formatter, CleanFormatter):
            before = handler.formatter
            handler.setFormatter(CleanFormatter(before or logging.Formatter()))
            undo.append(lambda handler=handler, before=before: handler.setFormatter(before))  # type: ignore[misc]
    for name, beginnings in _OF_STRANGERS.items():
        logger = logging.getLogger(name)
        made = RateFilter(logger, beginnings)
        logger.addFilter(made)
        undo.append(lambda logger=logger, made=made: logger.removeFilter(made))  # type: ignore[misc]

    def restore() -> None:
        for step in undo:
            step()

    return restore
