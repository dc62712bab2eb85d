"""The HTTP status and text of each error of the package."""

from __future__ import annotations

from jupyter_client.kernelspec import NoSuchKernel
from tornado import web

from gateway_slurm.errors import (
    AllocationError,
    ConfigError,
    GatewaySlurmError,
    KernelStartError,
    LinkError,
    NotAllowed,
    RequestError,
    SlurmError,
    StoreError,
    SubmitRefused,
    UnknownJob,
)
from gateway_slurm.events import NOT_KNOWN_NOW, OVER_LIMIT, TAKEN_ID, UNKNOWN_KERNELSPEC, outcome_of, reason_of

# The first class that the error is an instance of counts.
STATUS: tuple[tuple[type[Exception], int], ...] = (
    (NotAllowed, 403),
    (RequestError, 400),
    (NoSuchKernel, 404),
    (FileNotFoundError, 404),
    (UnknownJob, 404),
    (SubmitRefused, 400),
    (ConfigError, 500),
    (AllocationError, 409),
    (KernelStartError, 502),
    (LinkError, 503),
    (SlurmError, 503),
    (StoreError, 503),
    (GatewaySlurmError, 500),
)
# How a start ends that the gateway itself refuses, by the status of its answer.
OUTCOME = {404: UNKNOWN_KERNELSPEC, 409: TAKEN_ID, 429: OVER_LIMIT, 503: NOT_KNOWN_NOW}


class PlainHTTPError(web.HTTPError):
    """An HTTPError whose text is its message alone: jupyter_server puts the text of an error into its own answers.

    ``brief`` is the message for the log, without the kernel's command line and output; default: the message.
    """

    def __init__(self, status_code: int, message: str, *, brief: str = "") -> None:
        super().__init__(status_code, message)
        self.brief = brief or message

    def get_message(self) -> str:
        """What tornado logs."""
        return self.brief

    def __str__(self) -> str:
        return message_of(self)


def as_http(error: BaseException) -> BaseException:
    """The HTTPError for an error of the package; any other error is returned unchanged."""
    for kind, status in STATUS:
        if isinstance(error, kind):
            return PlainHTTPError(status, str(error), brief=reason_of(error))
    return error


def refusal_of(error: Exception) -> tuple[str, str]:
    """How a start ended that was refused with this error (``events.OUTCOMES``), and why, for an event."""
    if isinstance(error, web.HTTPError):
        return OUTCOME.get(error.status_code) or outcome_of(error), log_text_of(error)
    return UNKNOWN_KERNELSPEC if isinstance(error, NoSuchKernel) else outcome_of(error), reason_of(error)


def log_text_of(error: web.HTTPError) -> str:
    """The text of an HTTPError for the log, which must not have what a kernel printed."""
    return error.brief if isinstance(error, PlainHTTPError) else message_of(error)


def message_of(error: web.HTTPError) -> str:
    """The text of an HTTPError, in which tornado has doubled the percent signs."""
    text = error.log_message or ""
    try:
        return text % error.args if error.args else text.replace("%%", "%")
    except (TypeError, ValueError):
        return text
