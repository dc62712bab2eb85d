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


class PlainHTTPError(web.HTTPError):
    """An HTTPError whose text is its message alone: jupyter_server puts the text of an error into its own answers."""

    def __str__(self) -> str:
        return message_of(self)


def as_http(error: BaseException) -> BaseException:
    """The HTTPError for an error of the package; any other error is returned unchanged."""
    for kind, status in STATUS:
        if isinstance(error, kind):
            return PlainHTTPError(status, str(error))
    return error


def message_of(error: web.HTTPError) -> str:
    """The text of an HTTPError, in which tornado has doubled the percent signs."""
    text = error.log_message or ""
    try:
        return text % error.args if error.args else text.replace("%%", "%")
    except (TypeError, ValueError):
        return text
