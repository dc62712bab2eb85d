"""What all of the gateway's handlers share: whose request it is, and errors in the user's terms."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from jupyter_client.jsonutil import json_default
from jupyter_client.kernelspec import NoSuchKernel
from jupyter_server.base.handlers import APIHandler
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
from gateway_slurm.gateway.identity import GatewayUser
from gateway_slurm.gateway.kernels import SlurmMappingKernelManager
from gateway_slurm.gateway.kernelspecs import GatewayKernelSpecManager
from gateway_slurm.gateway.passing import RETRY_AFTER, PassesOn
from gateway_slurm.gateway.sessions import GatewaySessionManager

# Seconds for which a request waits for the kernels of before; clients give up later than this.
RESTORE_SECONDS = 10.0
NOT_RESTORED = "the gateway has just been started, and does not have its kernels yet: try again"
# The first class that fits counts.
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


def as_http(error: BaseException) -> BaseException:
    """An error of ours as HTTP's; any other as it is."""
    for kind, status in STATUS:
        if isinstance(error, kind):
            return web.HTTPError(status, str(error))
    return error


def message_of(error: web.HTTPError) -> str:
    """The text that an HTTPError was made with: tornado doubles its percent signs."""
    text = error.log_message or ""
    try:
        return text % error.args if error.args else text.replace("%%", "%")
    except (TypeError, ValueError):
        return text


async def until_restored(handler: web.RequestHandler) -> None:
    """Wait for the kernels of before, a while; raises HTTPError 503, to be tried again, when they are not there."""
    restorer = handler.settings["kernel_manager"].restorer
    try:
        await asyncio.wait_for(restorer.done.wait(), RESTORE_SECONDS)
    except asyncio.TimeoutError as error:
        raise web.HTTPError(503, NOT_RESTORED) from error


class GatewayHandler(PassesOn, APIHandler):
    """A handler of the gateway's API: JSON in and out, and each user sees what is theirs."""

    auth_resource = "kernels"
    waits_for_kernels = True
    """Whether a request is answered only once the kernels of an earlier gateway are there."""

    async def prepare(self) -> None:  # type: ignore[override] # tornado awaits what is awaitable
        """Also wait for the kernels of before; what another gateway has is answered by it."""
        await super().prepare()
        if self.waits_for_kernels:
            await until_restored(self)
        if not self._finished:
            await self.pass_on_what_is_elsewhere()

    @property
    def user(self) -> GatewayUser:
        """Who asks; handlers are entered by known users only."""
        user = self.current_user
        assert isinstance(user, GatewayUser)
        return user

    @property
    def kernels(self) -> SlurmMappingKernelManager:
        """The gateway's kernel manager."""
        manager: SlurmMappingKernelManager = self.settings["kernel_manager"]
        return manager

    @property
    def sessions(self) -> GatewaySessionManager:
        """The gateway's sessions."""
        manager: GatewaySessionManager = self.settings["session_manager"]
        return manager

    @property
    def specs(self) -> GatewayKernelSpecManager:
        """The gateway's kernelspecs."""
        manager: GatewayKernelSpecManager = self.settings["kernel_spec_manager"]
        return manager

    def check_kernel(self, kernel_id: str) -> None:
        """Raise HTTPError 404 for a kernel that is not there, or not this user's to see."""
        if not self.kernels.is_visible(kernel_id, self.user):
            raise web.HTTPError(404, f"there is no kernel {kernel_id}")

    def json_object(self) -> dict[str, Any]:
        """The request's body; raises HTTPError 400 for one that is no JSON object. No body is an empty one."""
        try:
            body = self.get_json_body()
        except (UnicodeDecodeError, RecursionError) as error:
            raise web.HTTPError(400, "the body must be a JSON object") from error
        if body is None:
            return {}
        if not isinstance(body, dict):
            raise web.HTTPError(400, "the body must be a JSON object")
        return body

    def answer(self, model: Any, status: int = 200) -> None:
        self.set_status(status)
        self.finish(json.dumps(model, default=json_default))

    def _handle_request_exception(self, e: BaseException) -> None:
        super()._handle_request_exception(as_http(e))

    def log_exception(self, typ: Any, value: Any, tb: Any) -> None:
        """What the user asked wrongly is no fault of the gateway's, and needs no traceback."""
        error = as_http(value)
        super().log_exception(type(error), error, None if error is not value else tb)

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """JSON, with the message in ``message`` as Jupyter's frontends show it."""
        # Tornado hands over what was raised, not what it was answered as.
        error = as_http(kwargs["exc_info"][1]) if "exc_info" in kwargs else None
        message = message_of(error) if isinstance(error, web.HTTPError) else ""
        if status_code == 503:
            self.set_header("Retry-After", RETRY_AFTER)
        if not message:
            message = "the gateway failed; its log says why" if status_code == 500 else self._reason
        self.finish(json.dumps({"message": message, "reason": self._reason}))


def text_field(body: dict[str, Any], name: str, default: str = "", *, longest: int = 4096) -> str:
    """A text of the body; raises HTTPError 400 for anything else."""
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, str) or len(value) > longest or "\0" in value:
        raise web.HTTPError(400, f"{name} must be a text of at most {longest} characters")
    return value


def env_field(body: dict[str, Any]) -> dict[str, str]:
    """``env`` of the body: names and texts."""
    env = object_field(body, "env")
    if not all(isinstance(value, str) for value in env.values()):
        raise web.HTTPError(400, "env must be an object of texts")
    return env


def object_field(body: dict[str, Any], name: str) -> dict[str, Any]:
    """An object of the body, empty where there is none; raises HTTPError 400 for anything else."""
    value = body.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise web.HTTPError(400, f"{name} must be an object")
    return value
