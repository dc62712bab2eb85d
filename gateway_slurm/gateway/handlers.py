"""The gateway's HTTP API: kernels, sessions, kernelspecs, allocations, status, and its own description.

It has no contents, terminals or files. ``openapi`` describes the operations; the last table maps paths to handlers.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import mimetypes
import re
import time
import uuid
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any, TypeVar, cast

import prometheus_client
from jupyter_client.jsonutil import json_default
from jupyter_client.kernelspec import NoSuchKernel
from jupyter_server.auth.decorator import allow_unauthenticated, authorized, ws_authenticated
from jupyter_server.base.handlers import APIHandler, APIVersionHandler, JupyterHandler
from jupyter_server.services.api.handlers import IdentityHandler
from jupyter_server.services.kernels.websocket import KernelWebsocketHandler
from jupyter_server.utils import url_escape, url_path_join
from tornado import web
from tornado.log import gen_log

from gateway_slurm._util import in_one_line
from gateway_slurm.bounded_json import load_json
from gateway_slurm.errors import GatewaySlurmError, LinkError, NotAllowed, RequestError
from gateway_slurm.events import by_of, reason_of
from gateway_slurm.gateway.auth.identity import GatewayIdentityProvider
from gateway_slurm.gateway.auth.peer import PROOF
from gateway_slurm.gateway.auth.user import GatewayUser, kernel_owner
from gateway_slurm.gateway.executions_api import KERNEL_ID, MSG_ID, UUID, list_executions, one_execution
from gateway_slurm.gateway.http_errors import PlainHTTPError, as_http, log_text_of, message_of, refusal_of
from gateway_slurm.gateway.jupyter_compat import UntrackedHandler
from gateway_slurm.gateway.kernel_manager import SlurmMappingKernelManager
from gateway_slurm.gateway.openapi import description
from gateway_slurm.gateway.peers.directory import ALLOCATIONS, KERNELS, SESSIONS
from gateway_slurm.gateway.peers.forward import (
    RETRY_AFTER,
    ForwardsRequests,
    check_deployment_limits,
    refuse_taken_id,
)
from gateway_slurm.gateway.peers.lists import with_peers
from gateway_slurm.gateway.peers.websocket import ForwardsWebsocket
from gateway_slurm.gateway.revocation import OpenWebsockets
from gateway_slurm.gateway.sessions import GatewaySessionManager, session_env
from gateway_slurm.gateway.slots import (
    MAX_UNDER_WAY,
    MAX_UNDER_WAY_SERVICE,
    MAX_WAITING,
    TooManyRequests,
    UserSlots,
)
from gateway_slurm.gateway.specs.manager import GatewayKernelSpecManager
from gateway_slurm.provisioner import SlurmProvisioner
from gateway_slurm.service import SlurmService
from gateway_slurm.store.records import SessionRecord

T = TypeVar("T")

# Seconds that a request waits until the earlier gateway's kernels are restored; clients give up later than this.
RESTORE_SECONDS = 10.0
# Bytes of a JSON body: a kernel's name and environment. More would hold up the loop.
MAX_JSON_BODY = 64 << 10
NOT_RESTORED = "the gateway has just been started, and its kernels are not restored yet: try again"
SESSION_ID = rf"(?P<session_id>{UUID})"
KERNEL_NAME = r"(?P<kernel_name>[\w.\-%]+)"
JOBID = r"(?P<jobid>[1-9][0-9]{0,9})"


async def wait_restored(handler: web.RequestHandler) -> None:
    """Wait until the earlier gateway's kernels are restored.

    Raises HTTPError 503 after ``RESTORE_SECONDS``, and at once where an attempt has failed and is made again.
    """
    restorer = handler.settings["kernel_manager"].restorer
    if reason := restorer.waits_because:
        raise web.HTTPError(503, reason)
    try:
        await asyncio.wait_for(restorer.done.wait(), RESTORE_SECONDS)
    except asyncio.TimeoutError as error:
        raise web.HTTPError(503, NOT_RESTORED) from error


class ExplainsErrors(JupyterHandler):
    """A handler whose errors are JSON with the reason; the log has it in one line, without a kernel's output."""

    @property
    def refusal(self) -> str:
        """Why the request's user is not known; "" where that is not known, or there is a user."""
        provider = self.identity_provider
        return provider.refusal_of(self) if isinstance(provider, GatewayIdentityProvider) else ""

    def set_default_headers(self) -> None:
        """As jupyter_server's, and a proof for another gateway. Tornado calls it again for an error."""
        super().set_default_headers()
        provider = self.identity_provider
        if isinstance(provider, GatewayIdentityProvider):
            for name, value in provider.answer_headers(self.request).items():
                self.set_header(name, value)

    def check_xsrf_cookie(self) -> None:
        """As jupyter_server's. Before that, raise HTTPError 403 with the reason for a user that is not known."""
        if self.refusal:
            raise web.HTTPError(403, self.refusal)
        super().check_xsrf_cookie()

    def _handle_request_exception(self, e: BaseException) -> None:
        super()._handle_request_exception(as_http(e))

    def log_exception(self, typ: Any, value: Any, tb: Any) -> None:
        """Log a mistake in a request in one line: it is no fault of the gateway's, and users write parts of it."""
        error = as_http(value)
        if not isinstance(error, web.HTTPError):
            super().log_exception(typ, value, tb)
        elif text := log_text_of(error):
            gen_log.warning("%d %s: %s", error.status_code, in_one_line(self._request_summary()), in_one_line(text))

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """Answer with JSON; Jupyter's frontends show its ``message``."""
        # Tornado passes the error that was raised, not the HTTPError for it.
        error = as_http(kwargs["exc_info"][1]) if "exc_info" in kwargs else None
        message = message_of(error) if isinstance(error, web.HTTPError) else ""
        if status_code == 503:
            self.set_header("Retry-After", RETRY_AFTER)
        if not message:
            message = "the gateway failed; its log says why" if status_code == 500 else self._reason
        self.set_header("Content-Type", "application/json")
        self.finish(json.dumps({"message": message, "reason": self._reason}))


class GatewayHandler(ForwardsRequests, ExplainsErrors, APIHandler):
    """A handler of the gateway's API: JSON in and out, and each user sees what they own."""

    auth_resource = "kernels"
    waits_for_kernels = True
    _leave: weakref.finalize[[Hashable], GatewayHandler] | None = None

    async def prepare(self) -> None:  # type: ignore[override] # tornado awaits what is awaitable
        """Wait until kernels are restored; forward a request for what another gateway holds."""
        await super().prepare()
        await self._take_turn()
        if self.waits_for_kernels:
            await wait_restored(self)
        if not self._finished:
            await self.forward_to_holder()

    @staticmethod
    def _check_size(body: bytes) -> None:
        if len(body) > MAX_JSON_BODY:
            message = f"the body has {len(body)} bytes, and at most {MAX_JSON_BODY} bytes of JSON are read"
            raise web.HTTPError(413, message)

    async def _take_turn(self) -> None:
        """Wait until fewer requests of this user are under way, and for the user's turn on this loop.

        Raises HTTPError 429 where too many wait already.
        """
        user = self.current_user
        if not isinstance(user, GatewayUser):
            return
        # Before it waits: the door counts a body only until it is here.
        self._check_size(self.request.body)
        slots: UserSlots = self.settings["user_slots"]
        # Forwarded requests have places of their own: two gateways that wait for each other would wait for a long time.
        key = user.username, PROOF in self.request.headers
        try:
            await slots.enter(key, MAX_UNDER_WAY_SERVICE if user.service else MAX_UNDER_WAY)
        except TooManyRequests:
            raise web.HTTPError(429, f"{MAX_WAITING} of your requests wait already: send fewer at once") from None
        # By the collector if not by ``on_finish``: a place that is not given back would lock the user out.
        self._leave = weakref.finalize(self, slots.leave, key)
        await self.kernels.turns.run(user.username, lambda: None)

    def on_finish(self) -> None:
        """The request has its answer, and gives its place to the user's next one."""
        if self._leave is not None:
            self._leave()
        super().on_finish()

    async def read_specs(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a method of the kernelspec manager, which reads the disk, in the user's turn."""
        return await self.specs.reader.run(self.user.username, function, *arguments)

    async def in_turn(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function that takes some milliseconds on this loop in the user's turn."""
        return await self.kernels.turns.run(self.user.username, function, *arguments)

    @property
    def user(self) -> GatewayUser:
        """The user of the request; handlers are entered by authenticated users only."""
        user = self.current_user
        assert isinstance(user, GatewayUser)
        return user

    @property
    def kernels(self) -> SlurmMappingKernelManager:
        return cast(SlurmMappingKernelManager, self.settings["kernel_manager"])

    @property
    def sessions(self) -> GatewaySessionManager:
        return cast(GatewaySessionManager, self.settings["session_manager"])

    @property
    def specs(self) -> GatewayKernelSpecManager:
        return cast(GatewayKernelSpecManager, self.settings["kernel_spec_manager"])

    def get_login_url(self) -> str:
        """Called where a request needs a user and has none. Raises HTTPError 403 with the reason."""
        raise web.HTTPError(403, self.refusal or "the user of this request is not known")

    def check_kernel(self, kernel_id: str) -> None:
        """Raise HTTPError 404 for a kernel that does not exist, or that this user may not see."""
        if not self.kernels.is_visible(kernel_id, self.user):
            raise web.HTTPError(404, f"there is no kernel {kernel_id}")

    def report(self, kind: str, **fields: object) -> None:
        """Emit an event (``events.KINDS``) of this request's user."""
        SlurmService.instance().events.emit(kind, **fields)

    def report_shutdown(self, kernel_id: str) -> None:
        """The user asks for the kernel's end."""
        self.report("kernel_shutdown", **self.request_facts(kernel_id))

    def request_facts(self, kernel_id: str) -> dict[str, str]:
        """The kernel, its owner and the user of the request, for an event."""
        name, owner = self.kernels.get_kernel(kernel_id).kernel_name, self.kernels.owner_of(kernel_id)
        return {"user": owner, "by": self.user.username, "kernel_id": kernel_id, "kernelspec": name}

    def json_object(self) -> dict[str, Any]:
        """The request's body, a JSON object, empty for no body. Raises HTTPError 400 for anything else."""
        content = self.request.body.strip()
        self._check_size(content)
        with self.charged():
            try:
                body = load_json(content, MAX_JSON_BODY) if content else {}
            except ValueError:  # text that is no JSON, or no UTF-8
                body = "not JSON"
        if not isinstance(body, dict):
            raise web.HTTPError(400, "the body must be a JSON object")
        return body

    def answer(self, model: Any, status: int = 200) -> None:
        self.set_status(status)
        with self.charged():
            content = json.dumps(model, default=json_default)
        self.finish(content)

    @contextlib.contextmanager
    def charged(self) -> Iterator[None]:
        """Count the time of the block as the user's on this loop."""
        begin = time.monotonic()
        try:
            yield
        finally:
            if isinstance(self.current_user, GatewayUser):
                self.kernels.turns.charge(self.current_user.username, time.monotonic() - begin)

    def answer_done(self) -> None:
        """Answer 204, without a body."""
        self.set_status(204)
        self.finish()


def text_field(body: dict[str, Any], name: str, default: str = "", *, max_length: int = 4096) -> str:
    """A text field of the body; raises HTTPError 400 for anything else."""
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, str) or len(value) > max_length or "\0" in value:
        raise web.HTTPError(400, f"{name} must be a text of at most {max_length} characters")
    return value


def env_field(body: dict[str, Any]) -> dict[str, str]:
    """``env`` of the body; raises HTTPError 400 for values that are not texts."""
    env = object_field(body, "env")
    if not all(isinstance(value, str) for value in env.values()):
        raise web.HTTPError(400, "env must be an object of texts")
    return env


def object_field(body: dict[str, Any], name: str) -> dict[str, Any]:
    """An object field of the body, empty for none; raises HTTPError 400 for anything else."""
    value = body.get(name)
    if not isinstance(value, dict | None):
        raise web.HTTPError(400, f"{name} must be an object")
    return value or {}


# -- Kernels, sessions, kernelspecs --


class StartsKernels(GatewayHandler):
    """A handler that starts kernels."""

    async def start_kernel(
        self, name: str, env: dict[str, str], kernel_id: str | None = None, session: Mapping[str, str] | None = None
    ) -> str:
        """Check the request, begin the start, return the kernel's id.

        ``env`` is the client's; ``session`` is added to the kernel's environment.
        Raises NotAllowed, RequestError, NoSuchKernel, and HTTPError 429 over a limit.
        """
        try:
            return await self._start_kernel(name, env, kernel_id, session)
        except PlainHTTPError:
            raise  # the start had begun, and the service has reported its end
        except (GatewaySlurmError, NoSuchKernel, web.HTTPError) as error:
            self._report_refusal(name, env, error)
            raise

    def _report_refusal(self, name: str, env: Mapping[str, str], error: Exception) -> None:
        owner = maker = self.user.username
        with contextlib.suppress(RequestError):  # the user may not name this owner, which is then what is refused
            owner = kernel_owner(self.user, env)
        outcome, reason = refusal_of(error)
        self.report(
            "kernel_refused", user=owner, by=by_of(owner, maker), kernelspec=name, outcome=outcome, reason=reason
        )

    async def _start_kernel(
        self, name: str, env: dict[str, str], kernel_id: str | None, session: Mapping[str, str] | None
    ) -> str:
        owner = kernel_owner(self.user, env)
        if kernel_id is not None:
            await refuse_taken_id(self, kernel_id)
        await check_deployment_limits(self, owner)
        if not name:
            name = await self.read_specs(self.specs.default_for, owner, self.kernels.default_kernel_name)
        # Kernelspecs and groups are read from disk.
        fields = await self.read_specs(self.specs.request_fields, name, owner, env)
        kernel_env = await self.read_specs(self.specs.kernel_env, name, env)
        return await self.kernels.start_kernel(
            kernel_name=name,
            kernel_id=kernel_id,
            owner=owner,
            maker=self.user.username,
            fields=fields,
            env={**kernel_env, **(session or {})},
            cwd=env.get("KERNEL_WORKING_DIR") or None,
        )


class KernelsHandler(StartsKernels):
    """``/api/kernels``."""

    @web.authenticated
    @authorized
    async def get(self) -> None:
        self.answer(await with_peers(self, KERNELS, await self.in_turn(self.kernels.models_for, self.user)))

    @web.authenticated
    @authorized
    async def post(self) -> None:
        """Start a kernel, from ``name`` and ``env``; answers at once."""
        body = self.json_object()
        kernel_id = text_field(body, "kernel_id") or None
        if kernel_id is not None and not re.fullmatch(UUID, kernel_id):
            raise web.HTTPError(400, "kernel_id must be a UUID")
        kernel_id = await self.start_kernel(text_field(body, "name"), env_field(body), kernel_id)
        self.set_header("Location", url_path_join(self.base_url, "api", "kernels", url_escape(kernel_id)))
        self.answer(self.kernels.kernel_model(kernel_id), 201)


class KernelHandler(GatewayHandler):
    """``/api/kernels/{kernel_id}``."""

    @web.authenticated
    @authorized
    async def get(self, kernel_id: str) -> None:
        self.check_kernel(kernel_id)
        self.answer(self.kernels.kernel_model(kernel_id))

    @web.authenticated
    @authorized
    async def delete(self, kernel_id: str) -> None:
        self.check_kernel(kernel_id)
        self.report_shutdown(kernel_id)
        await self.kernels.shutdown_kernel(kernel_id)
        self.answer_done()


class KernelActionHandler(GatewayHandler):
    """``/api/kernels/{kernel_id}/interrupt`` and ``…/restart``."""

    @web.authenticated
    @authorized
    async def post(self, kernel_id: str, action: str) -> None:
        self.check_kernel(kernel_id)
        if action == "interrupt":
            self.report("kernel_interrupt", **self.request_facts(kernel_id))
            await self.kernels.interrupt_kernel(kernel_id)
            self.answer_done()
        else:
            self.kernels.count_start(self.kernels.owner_of(kernel_id))
            self.report("kernel_restart", **self.request_facts(kernel_id))
            await self.kernels.restart_kernel(kernel_id)
            self.answer(self.kernels.kernel_model(kernel_id))


class KernelLogsHandler(GatewayHandler):
    """``/api/kernels/{kernel_id}/logs``."""

    @web.authenticated
    @authorized
    async def get(self, kernel_id: str) -> None:
        """The ends of the logs of the kernel and of its launcher, which the node sends: empty before the kernel runs.

        409 where the node cannot send them now.
        """
        self.check_kernel(kernel_id)
        provisioner: Any = self.kernels.get_kernel(kernel_id).provisioner
        logs = {"kernel": "", "launcher": ""}
        try:
            if isinstance(provisioner, SlurmProvisioner) and provisioner.holds_kernel:
                logs = await provisioner.read_logs()
        except LinkError as error:
            message = "the logs cannot be read now: {}"
            raise PlainHTTPError(409, message.format(error), brief=message.format(reason_of(error))) from error
        self.answer(logs)


class ExecutionsHandler(GatewayHandler):
    """``/api/kernels/{kernel_id}/executions``."""

    @web.authenticated
    @authorized
    async def get(self, kernel_id: str) -> None:
        """The kernel's last executions, the newest first: each cell's state, without its outputs."""
        self.check_kernel(kernel_id)
        self.answer(await list_executions(self, kernel_id))


class ExecutionHandler(GatewayHandler):
    """``/api/kernels/{kernel_id}/executions/{msg_id}``."""

    @web.authenticated
    @authorized
    async def get(self, kernel_id: str, msg_id: str) -> None:
        """One execution, with its outputs as a notebook has them."""
        self.check_kernel(kernel_id)
        self.answer(await one_execution(self, kernel_id, msg_id))


class ChannelsHandler(ForwardsWebsocket, ExplainsErrors, KernelWebsocketHandler):
    """``/api/kernels/{kernel_id}/channels``: the websocket."""

    async def prepare(self, *args: Any, **kwargs: Any) -> None:
        try:
            await super().prepare(*args, **kwargs)
        except web.HTTPError as error:
            if error.status_code == 403 and self.refusal:  # jupyter_server's has no reason
                raise web.HTTPError(403, self.refusal) from error
            raise
        await wait_restored(self)

    @ws_authenticated
    async def get(self, kernel_id: str) -> None:
        if await self.forward_websocket(kernel_id):
            return
        if not self.settings["kernel_manager"].is_visible(kernel_id, self.current_user):
            raise web.HTTPError(404, f"there is no kernel {kernel_id}")
        if reason := await self.open_websockets.why_not_member(kernel_id):
            raise web.HTTPError(403, reason)
        await super().get(kernel_id=kernel_id)

    @property
    def open_websockets(self) -> OpenWebsockets:
        """All websockets to kernels, which end with the right to them."""
        return cast(OpenWebsockets, self.settings["open_websockets"])

    async def open(self, kernel_id: str) -> None:
        """The websocket is open."""
        self.open_websockets.add(self, kernel_id)
        await super().open(kernel_id)

    def on_close(self) -> None:
        """The websocket is closed."""
        self.open_websockets.remove(self)
        super().on_close()


class SessionsHandler(StartsKernels):
    """``/api/sessions``."""

    @web.authenticated
    @authorized
    async def get(self) -> None:
        self.answer(await with_peers(self, SESSIONS, await self.in_turn(self.models)))

    def models(self) -> list[dict[str, Any]]:
        """The models of the sessions that the user may see."""
        return [self.sessions.model(session) for session in self.sessions.all() if self.is_visible(session)]

    def is_visible(self, session: SessionRecord) -> bool:
        return self.kernels.is_visible(session.kernel_id, self.user)

    @web.authenticated
    @authorized
    async def post(self) -> None:
        """The document's session: the existing one, or a new one with a new kernel."""
        body = self.json_object()
        path, kind = text_field(body, "path"), text_field(body, "type", "notebook")
        name, kernel, env = text_field(body, "name"), object_field(body, "kernel"), env_field(body)
        if not path:
            raise web.HTTPError(400, "path must not be empty")
        owner = kernel_owner(self.user, env)
        if await self.forward_session(owner, path, text_field(kernel, "id")):
            return
        # A page that is reloaded sends the request again before the first answer.
        async with self.sessions.lock(path, owner):
            # A service gets no session that its user has made.
            session = self.sessions.at(path, owner, self.is_visible)
            if session is None:
                self.sessions.check_limit(owner)
                kernel_id = await self.kernel_for(kernel, env, session_env(path, name))
                session = SessionRecord(
                    session_id=str(uuid.uuid4()), owner=owner, kernel_id=kernel_id, path=path, name=name, type=kind
                )
                self.sessions.put(session)
        self.set_header("Location", url_path_join(self.base_url, "api", "sessions", session.session_id))
        self.answer(self.sessions.model(session), 201)

    async def kernel_for(self, kernel: dict[str, Any], env: dict[str, str], session: dict[str, str]) -> str:
        """The kernel whose id the body has, or a new one."""
        kernel_id = text_field(kernel, "id")
        if kernel_id:
            self.check_kernel(kernel_id)
            return kernel_id
        return await self.start_kernel(text_field(kernel, "name"), env, session=session)


class SessionHandler(SessionsHandler):
    """``/api/sessions/{session_id}``."""

    def session(self, session_id: str) -> SessionRecord:
        """The user's session; raises HTTPError 404 for another id."""
        found = self.sessions.find(session_id)
        if found is None or not self.is_visible(found):
            raise web.HTTPError(404, f"there is no session {session_id}")
        return found

    @web.authenticated
    @authorized
    async def get(self, session_id: str) -> None:
        self.answer(self.sessions.model(self.session(session_id)))

    @web.authenticated
    @authorized
    async def patch(self, session_id: str) -> None:
        """Rename the session's document, or give it another kernel; its earlier kernel ends."""
        session, body = self.session(session_id), self.json_object()
        kernel = object_field(body, "kernel")
        path, name, kind = (text_field(body, key, getattr(session, key)) for key in ("path", "name", "type"))
        earlier = kernel_id = session.kernel_id
        env = dict(env_field(body))
        if session.owner != self.user.username:
            env.setdefault("KERNEL_USERNAME", session.owner)
        moved = {"path": path, "name": name, "type": kind, "kernel": kernel, "env": env}
        answer = await self.create_session_at_peer(text_field(kernel, "id"), moved)
        if answer is not None:  # the new kernel's gateway has the session now
            self.sessions.remove(session_id)
        else:
            if kernel.get("id") or kernel.get("name"):
                kernel_id = await self.kernel_for(kernel, env, session_env(path, name))
            session = replace(session, path=path, name=name, type=kind, kernel_id=kernel_id)
            self.sessions.put(session)
        if (answer is not None or kernel_id != earlier) and earlier in self.kernels:
            self.report_shutdown(earlier)
            await self.kernels.shutdown_kernel(earlier)
        if answer is not None:
            self.relay_answer(answer, status=200)
        else:
            self.answer(self.sessions.model(session))

    @web.authenticated
    @authorized
    async def delete(self, session_id: str) -> None:
        session = self.session(session_id)
        self.sessions.remove(session_id)
        self.report_shutdown(session.kernel_id)
        await self.kernels.shutdown_kernel(session.kernel_id)
        self.answer_done()


class KernelSpecsHandler(GatewayHandler):
    """``/api/kernelspecs``."""

    auth_resource = "kernelspecs"

    @web.authenticated
    @authorized
    async def get(self) -> None:
        """The kernelspecs that this user may start; a service names its user by ``?user=``."""
        named = {"KERNEL_USERNAME": name} if (name := self.get_argument("user", "")) else {}
        owner = kernel_owner(self.user, named)
        reader, user = self.specs.reader, self.user.username
        specs = await reader.run_shared(user, self.specs.specs_for, owner, self.base_url)
        default = await reader.run_shared(user, self.specs.default_for, owner, self.kernels.default_kernel_name)
        self.answer({"default": default, "kernelspecs": specs})


class KernelSpecHandler(GatewayHandler):
    """``/api/kernelspecs/{kernel_name}``."""

    auth_resource = "kernelspecs"

    @web.authenticated
    @authorized
    async def get(self, kernel_name: str) -> None:
        self.answer(await self.read_specs(self.specs.model_for, kernel_name, self.user.username, self.base_url))


class KernelSpecResourceHandler(GatewayHandler):
    """``/kernelspecs/{kernel_name}/{path}``: logos, kernel.js and kernel.css."""

    auth_resource = "kernelspecs"

    @web.authenticated
    @authorized
    async def get(self, kernel_name: str, path: str) -> None:
        content = await self.read_specs(self.specs.resource, kernel_name, path, self.user.username)
        kind = mimetypes.guess_type(path)[0] or "application/octet-stream"
        self.finish(content, set_content_type=kind)


# -- Allocations, status, health, description --


class AllocationsHandler(GatewayHandler):
    """``/api/allocations``."""

    @property
    def owner(self) -> str | None:
        """The name of the user whose allocations are visible; None, for admins: those of all users."""
        return None if self.user.admin else self.user.username

    def allocation(self, jobid: str) -> dict[str, Any]:
        """The allocation's model; raises HTTPError 404 for one that is over, or that the user may not see."""
        allocations = SlurmService.instance().allocations_of(self.owner)
        found = next((allocation for allocation in allocations if allocation["jobid"] == jobid), None)
        if found is None:
            raise web.HTTPError(404, f"there is no allocation {jobid} of yours")
        return found

    def allocation_facts(self, jobid: str) -> dict[str, str]:
        """The allocation, its owner and the user of the request, for an event. Raises HTTPError 404."""
        return {"user": self.allocation(jobid)["owner"], "by": self.user.username, "jobid": jobid}

    @web.authenticated
    @authorized
    async def get(self) -> None:
        models = await self.in_turn(SlurmService.instance().allocations_of, self.owner)
        self.answer(await with_peers(self, ALLOCATIONS, models))


class AllocationHandler(AllocationsHandler):
    """``/api/allocations/{jobid}``."""

    @web.authenticated
    @authorized
    async def get(self, jobid: str) -> None:
        self.answer(self.allocation(jobid))

    @web.authenticated
    @authorized
    async def delete(self, jobid: str) -> None:
        service = SlurmService.instance()
        self.report("allocation_cancelled", **self.allocation_facts(jobid))
        await service.run(service.cancel_allocation(self.owner, jobid))
        self.answer_done()


class AllocationActionHandler(AllocationsHandler):
    """``/api/allocations/{jobid}/keep`` and ``…/release``."""

    @web.authenticated
    @authorized
    async def post(self, jobid: str, action: str) -> None:
        service = SlurmService.instance()
        if action == "keep":
            await self._check_may_keep(jobid)
            self.report("allocation_kept", **self.allocation_facts(jobid))
            await service.run(service.keep_allocation(self.owner, jobid))
        else:
            self.report("allocation_not_kept", **self.allocation_facts(jobid))
            await service.run(service.release_allocation(self.owner, jobid))
        self.answer_done()

    async def _check_may_keep(self, jobid: str) -> None:
        """Raise NotAllowed where the request field ``keep_allocation`` is not allowed either, and HTTPError 404."""
        held = [self.kernels.find_kernel(kernel_id) for kernel_id in self.allocation(jobid)["kernel_ids"]]
        names = [str(kernel.kernel_name) for kernel in held if kernel is not None]
        if not self.user.admin and not await self.read_specs(self.specs.may_set, "keep_allocation", names):
            message = "you may not keep allocations: neither the project nor the gateway allows keep_allocation"
            raise NotAllowed(message, field="keep_allocation")


class StatusHandler(UntrackedHandler, GatewayHandler):
    """``/api/status``."""

    @web.authenticated
    @authorized
    async def get(self) -> None:
        """When the gateway was started, and the last activity and number of the user's kernels and connections."""
        models = await with_peers(self, KERNELS, await self.in_turn(self.kernels.models_for, self.user))
        started = _as_utc(self.settings["started"])
        self.answer(
            {
                "started": started,
                # Of the user's own kernels: another's activity is not the user's to know.
                "last_activity": max((model["last_activity"] for model in models), default=started),
                "kernels": len(models),
                "connections": sum(model["connections"] for model in models),
            }
        )


def _as_utc(time: datetime) -> str:
    """A time as Jupyter's REST API writes it."""
    return time.astimezone(timezone.utc).isoformat().replace("+00:00", "Z")


class MeHandler(GatewayHandler, IdentityHandler):
    """``/api/me``: Jupyter server's handler, with this API's errors."""


class LiveHandler(UntrackedHandler, GatewayHandler):
    """``/health/live``: the process answers."""

    waits_for_kernels = False

    @allow_unauthenticated
    async def get(self) -> None:
        self.answer({"status": "live"})


class ReadyHandler(UntrackedHandler, GatewayHandler):
    """``/health/ready``: earlier kernels are restored, and new ones can be started."""

    waits_for_kernels = False

    @allow_unauthenticated
    async def get(self) -> None:
        """Answer 503 while launchers cannot reach this gateway, and until its earlier kernels are restored."""
        reason, service = NOT_RESTORED, SlurmService.instance()
        if self.kernels.restorer.done.is_set():
            reason = await service.run(service.why_not_ready())
        elif self.kernels.restorer.waits_because:
            reason = self.kernels.restorer.waits_because
        if reason:
            self.set_header("Retry-After", RETRY_AFTER)
            self.answer({"status": "not ready", "reason": reason}, 503)
        else:
            self.answer({"status": "ready"})


class DescriptionHandler(UntrackedHandler, GatewayHandler):
    """``/api/spec.json``: this API in OpenAPI. It needs no authentication: no secret is in it."""

    waits_for_kernels = False

    @allow_unauthenticated
    async def get(self) -> None:
        self.answer(description(self.base_url))


class MetricsHandler(UntrackedHandler, GatewayHandler):
    """``/metrics``, in place of jupyter_server's, which any user may read."""

    waits_for_kernels = False

    @allow_unauthenticated
    async def get(self) -> None:
        """Answer admins and the users that ``metrics_users`` names; any client if the setting says so."""
        provider = self.settings["identity_provider"]
        if self.settings["authenticate_prometheus"] and not provider.may_read_metrics(self.current_user):
            message = "metrics are for admins and for the users in GatewayIdentityProvider.metrics_users"
            raise web.HTTPError(403, message)
        self.finish(prometheus_client.generate_latest(), set_content_type=prometheus_client.CONTENT_TYPE_LATEST)


class UnknownHandler(UntrackedHandler, GatewayHandler):
    """All other paths, in place of jupyter_server's pages: JSON, also in an error, and no cookie."""

    async def prepare(self) -> None:  # type: ignore[override] # tornado awaits what is awaitable
        """Answer 404 to a user; without authentication the answer is the same as for any path."""
        await super().prepare()
        raise web.HTTPError(404, "there is nothing at this path; /api/spec.json lists the API's paths")


# jupyter_server finds the table by this name.
default_handlers = [
    (r"/api/kernels", KernelsHandler),
    (rf"/api/kernels/{KERNEL_ID}", KernelHandler),
    (rf"/api/kernels/{KERNEL_ID}/(?P<action>interrupt|restart)", KernelActionHandler),
    (rf"/api/kernels/{KERNEL_ID}/logs", KernelLogsHandler),
    (rf"/api/kernels/{KERNEL_ID}/executions", ExecutionsHandler),
    (rf"/api/kernels/{KERNEL_ID}/executions/{MSG_ID}", ExecutionHandler),
    (rf"/api/kernels/{KERNEL_ID}/channels", ChannelsHandler),
    (r"/api/sessions", SessionsHandler),
    (rf"/api/sessions/{SESSION_ID}", SessionHandler),
    (r"/api/kernelspecs", KernelSpecsHandler),
    (rf"/api/kernelspecs/{KERNEL_NAME}", KernelSpecHandler),
    (rf"/kernelspecs/{KERNEL_NAME}/(?P<path>.*)", KernelSpecResourceHandler),
    (r"/api/allocations", AllocationsHandler),
    (rf"/api/allocations/{JOBID}", AllocationHandler),
    (rf"/api/allocations/{JOBID}/(?P<action>keep|release)", AllocationActionHandler),
    (r"/api/status", StatusHandler),
    (r"/api/me", MeHandler),
    (r"/api/spec.json", DescriptionHandler),
    (r"/metrics", MetricsHandler),
    (r"/health/live", LiveHandler),
    (r"/health/ready", ReadyHandler),
    (r"/api", APIVersionHandler),
    (r"/.+", UnknownHandler),
]
