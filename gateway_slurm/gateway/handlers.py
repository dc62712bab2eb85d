"""The gateway's API: kernels, sessions, kernelspecs; no contents, no terminals, no files."""

from __future__ import annotations

import asyncio
import mimetypes
import re
from collections.abc import Collection, Mapping
from typing import Any

from jupyter_server.auth.decorator import authorized, ws_authenticated
from jupyter_server.services.kernels.websocket import KernelWebsocketHandler
from jupyter_server.utils import url_escape, url_path_join
from tornado import web

from gateway_slurm.gateway.base import GatewayHandler, env_field, object_field, text_field, until_restored
from gateway_slurm.gateway.identity import kernel_owner
from gateway_slurm.gateway.merged import with_others
from gateway_slurm.gateway.passing import check_limits_everywhere, refuse_taken_id
from gateway_slurm.gateway.peerchannels import JoinsPeers
from gateway_slurm.gateway.peers import KERNELS, SESSIONS
from gateway_slurm.gateway.sessions import Session, session_env

_UUID = r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}"
KERNEL_ID = rf"(?P<kernel_id>{_UUID})"
SESSION_ID = rf"(?P<session_id>{_UUID})"
KERNEL_NAME = r"(?P<kernel_name>[\w.\-%]+)"


class StartsKernels(GatewayHandler):
    """A handler that starts kernels."""

    async def start_kernel(
        self, name: str, env: dict[str, str], kernel_id: str | None = None, session: Mapping[str, str] | None = None
    ) -> str:
        """Check what is asked for, begin the start, return the kernel's id.

        ``env`` is the client's, ``session`` what goes to the kernel besides.
        Raises NotAllowed, RequestError, NoSuchKernel, or HTTPError for limits.
        """
        owner = kernel_owner(self.user, env)
        await check_limits_everywhere(self, owner)
        name = name or await self.default_name(owner)
        # Kernelspecs and groups are looked up on disk.
        fields = await asyncio.to_thread(self.specs.request_fields, name, owner, env)
        kernel_env = await asyncio.to_thread(self.specs.kernel_env, name, env)
        return await self.kernels.start_kernel(
            kernel_name=name,
            kernel_id=kernel_id,
            owner=owner,
            maker=self.user.username,
            fields=fields,
            env={**kernel_env, **(session or {})},
            cwd=env.get("KERNEL_WORKING_DIR") or None,
        )

    async def default_name(self, owner: str) -> str:
        """The kernelspec for who names none: the one that the list calls so."""
        specs = await asyncio.to_thread(self.specs.specs_for, owner, self.base_url)
        return _default_name(self.kernels.default_kernel_name, specs)


def _default_name(wanted: str, specs: Collection[str]) -> str:
    """The admin's, where its user sees it; else the first one that they see."""
    return wanted if wanted in specs or not specs else min(specs)


class KernelsHandler(StartsKernels):
    """``/api/kernels``."""

    @web.authenticated
    @authorized
    async def get(self) -> None:
        """The user's kernels."""
        self.answer(await with_others(self, KERNELS, self.kernels.models_for(self.user)))

    @web.authenticated
    @authorized
    async def post(self) -> None:
        """Start a kernel: ``name``, ``env``; answers at once."""
        body = self.json_object()
        kernel_id = text_field(body, "kernel_id") or None
        if kernel_id is not None and not re.fullmatch(_UUID, kernel_id):
            raise web.HTTPError(400, "kernel_id must be a UUID")
        if kernel_id is not None:
            await refuse_taken_id(self, kernel_id)
        kernel_id = await self.start_kernel(text_field(body, "name"), env_field(body), kernel_id)
        self.set_header("Location", url_path_join(self.base_url, "api", "kernels", url_escape(kernel_id)))
        self.answer(self.kernels.kernel_model(kernel_id), 201)


class KernelHandler(GatewayHandler):
    """``/api/kernels/{kernel_id}``."""

    @web.authenticated
    @authorized
    async def get(self, kernel_id: str) -> None:
        """The kernel: its state, and where it waits or runs."""
        self.check_kernel(kernel_id)
        self.answer(self.kernels.kernel_model(kernel_id))

    @web.authenticated
    @authorized
    async def delete(self, kernel_id: str) -> None:
        """End it, or give up its start."""
        self.check_kernel(kernel_id)
        await self.kernels.shutdown_kernel(kernel_id)
        self.set_status(204)
        self.finish()


class KernelActionHandler(GatewayHandler):
    """``/api/kernels/{kernel_id}/interrupt`` and ``…/restart``."""

    @web.authenticated
    @authorized
    async def post(self, kernel_id: str, action: str) -> None:
        """Interrupt, or restart in the same allocation."""
        self.check_kernel(kernel_id)
        if action == "interrupt":
            await self.kernels.interrupt_kernel(kernel_id)
            self.set_status(204)
            self.finish()
        else:
            await self.kernels.restart_kernel(kernel_id)
            self.answer(self.kernels.kernel_model(kernel_id))


class ChannelsHandler(JoinsPeers, KernelWebsocketHandler):
    """``/api/kernels/{kernel_id}/channels``: the websocket."""

    async def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Also wait for the kernels of before."""
        await super().prepare(*args, **kwargs)
        await until_restored(self)

    @ws_authenticated
    async def get(self, kernel_id: str) -> None:
        """Upgrade; 404 for a kernel that is not there, or not this user's to see."""
        if await self.joined_peer(kernel_id):
            return
        if not self.settings["kernel_manager"].is_visible(kernel_id, self.current_user):
            raise web.HTTPError(404, f"there is no kernel {kernel_id}")
        await super().get(kernel_id=kernel_id)


class SessionsHandler(StartsKernels):
    """``/api/sessions``."""

    @web.authenticated
    @authorized
    async def get(self) -> None:
        """The user's sessions."""
        own = [self.sessions.model(one) for one in self.sessions.all() if self.is_mine(one)]
        self.answer(await with_others(self, SESSIONS, own))

    def is_mine(self, session: Session) -> bool:
        return self.kernels.is_visible(session.kernel_id, self.user)

    @web.authenticated
    @authorized
    async def post(self) -> None:
        """The document's session: the one there is, or a new one with a new kernel."""
        body = self.json_object()
        path, kind = text_field(body, "path"), text_field(body, "type", "notebook")
        name, kernel, env = text_field(body, "name"), object_field(body, "kernel"), env_field(body)
        if not path:
            raise web.HTTPError(400, "path must not be empty")
        owner = kernel_owner(self.user, env)
        if await self.pass_on_session(owner, path, text_field(kernel, "id")):
            return
        # A frontend that is reloaded asks again before the first answer is there.
        async with self.sessions.lock(path, owner):
            session = self.sessions.at(path, owner)
            if session is None:
                kernel_id = await self.kernel_for(kernel, env, session_env(path, name))
                session = self.sessions.add(path=path, name=name, type=kind, kernel_id=kernel_id, owner=owner)
        self.set_header("Location", url_path_join(self.base_url, "api", "sessions", session.session_id))
        self.answer(self.sessions.model(session), 201)

    async def kernel_for(self, kernel: dict[str, Any], env: dict[str, str], session: dict[str, str]) -> str:
        """The kernel that a session names by its id, or a new one."""
        kernel_id = text_field(kernel, "id")
        if kernel_id:
            self.check_kernel(kernel_id)
            return kernel_id
        return await self.start_kernel(text_field(kernel, "name"), env, session=session)


class SessionHandler(SessionsHandler):
    """``/api/sessions/{session_id}``."""

    def session(self, session_id: str) -> Session:
        """The user's session; raises HTTPError 404."""
        found = self.sessions.find(session_id)
        if found is None or not self.is_mine(found):
            raise web.HTTPError(404, f"there is no session {session_id}")
        return found

    @web.authenticated
    @authorized
    async def get(self, session_id: str) -> None:
        """The session."""
        self.answer(self.sessions.model(self.session(session_id)))

    @web.authenticated
    @authorized
    async def patch(self, session_id: str) -> None:
        """Rename its document, or give it another kernel; the one it had ends."""
        session, body = self.session(session_id), self.json_object()
        kernel = object_field(body, "kernel")
        path, name, kind = (text_field(body, key, getattr(session, key)) for key in ("path", "name", "type"))
        before = session.kernel_id
        env = dict(env_field(body))
        if session.owner != self.user.username:
            env.setdefault("KERNEL_USERNAME", session.owner)
        moved = {"path": path, "name": name, "type": kind, "kernel": kernel, "env": env}
        answer = await self.session_made_at(text_field(kernel, "id"), moved)
        if answer is not None:  # it has gone where its new kernel is
            self.sessions.remove(session_id)
        elif kernel.get("id") or kernel.get("name"):
            session.kernel_id = await self.kernel_for(kernel, env, session_env(path, name))
        session.path, session.name, session.type = path, name, kind
        if answer is None:
            self.sessions.changed(session)
        if (answer is not None or session.kernel_id != before) and before in self.kernels:
            await self.kernels.shutdown_kernel(before)
        if answer is not None:
            self.answer_as(answer, status=200)
        else:
            self.answer(self.sessions.model(session))

    @web.authenticated
    @authorized
    async def delete(self, session_id: str) -> None:
        """End the session, and its kernel."""
        session = self.session(session_id)
        self.sessions.remove(session_id)
        await self.kernels.shutdown_kernel(session.kernel_id)
        self.set_status(204)
        self.finish()


class KernelSpecsHandler(GatewayHandler):
    """``/api/kernelspecs``."""

    auth_resource = "kernelspecs"

    @web.authenticated
    @authorized
    async def get(self) -> None:
        """The kernelspecs that this user may start; a service names its user by ``?user=``, as it does for kernels."""
        named = {"KERNEL_USERNAME": name} if (name := self.get_argument("user", "")) else {}
        owner = kernel_owner(self.user, named)
        specs = await asyncio.to_thread(self.specs.specs_for, owner, self.base_url)
        self.answer({"default": _default_name(self.kernels.default_kernel_name, specs), "kernelspecs": specs})


class KernelSpecHandler(GatewayHandler):
    """``/api/kernelspecs/{kernel_name}``."""

    auth_resource = "kernelspecs"

    @web.authenticated
    @authorized
    async def get(self, kernel_name: str) -> None:
        """One kernelspec."""
        self.answer(await asyncio.to_thread(self.specs.model_for, kernel_name, self.user.username, self.base_url))


class KernelSpecResourceHandler(GatewayHandler):
    """``/kernelspecs/{kernel_name}/{path}``: logos and the like."""

    auth_resource = "kernelspecs"

    @web.authenticated
    @authorized
    async def get(self, kernel_name: str, path: str) -> None:
        """A file of a kernelspec that the user sees."""
        content = await asyncio.to_thread(self.specs.resource, kernel_name, path, self.user.username)
        kind = mimetypes.guess_type(path)[0] or "application/octet-stream"
        self.finish(content, set_content_type=kind)


default_handlers = [
    (r"/api/kernels", KernelsHandler),
    (rf"/api/kernels/{KERNEL_ID}", KernelHandler),
    (rf"/api/kernels/{KERNEL_ID}/(?P<action>interrupt|restart)", KernelActionHandler),
    (rf"/api/kernels/{KERNEL_ID}/channels", ChannelsHandler),
    (r"/api/sessions", SessionsHandler),
    (rf"/api/sessions/{SESSION_ID}", SessionHandler),
    (r"/api/kernelspecs", KernelSpecsHandler),
    (rf"/api/kernelspecs/{KERNEL_NAME}", KernelSpecHandler),
    (rf"/kernelspecs/{KERNEL_NAME}/(?P<path>.*)", KernelSpecResourceHandler),
]
