"""Websockets end with the right to them: the token, the user at the JupyterHub, or the membership in the project.

A websocket's user is checked when it opens, and again every some seconds. Where the check itself is not possible, such
as during an outage of the hub or of slurmdbd, the websockets stay.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import Any, Final

from tornado.web import HTTPError
from tornado.websocket import WebSocketHandler

from gateway_slurm.gateway.auth.identity import GatewayIdentityProvider
from gateway_slurm.gateway.auth.user import GatewayUser
from gateway_slurm.gateway.channels.websocket import POLICY_VIOLATION
from gateway_slurm.gateway.specs.manager import GatewayKernelSpecManager

AT_ONCE: Final = 8
"""Checks at a time: one that waits does not hold up the others."""
NOT_KNOWN: Final = "your token is not valid any more"


class OpenWebsockets:
    """The open websockets to kernels, here or at other gateways. Used on one loop; ``watch`` runs until cancelled."""

    def __init__(
        self,
        provider: GatewayIdentityProvider,
        specs: GatewayKernelSpecManager,
        kernels: Any,
        log: logging.Logger | logging.LoggerAdapter[Any],
    ) -> None:
        self._provider, self._specs, self._kernels, self._log = provider, specs, kernels, log
        self._open: dict[WebSocketHandler, str] = {}

    def add(self, handler: WebSocketHandler, kernel_id: str) -> None:
        """The websocket is open."""
        self._open[handler] = kernel_id

    def remove(self, handler: WebSocketHandler) -> None:
        """It is closed."""
        self._open.pop(handler, None)

    async def watch(self, interval: float) -> None:
        """Close the websockets whose users may not have them any more, each ``interval`` seconds."""
        while True:
            await asyncio.sleep(interval)
            try:
                await self.check()
            except Exception:  # noqa: BLE001 - the next round must come, whatever one websocket does
                self._log.exception("websockets are not checked now")

    async def check(self) -> None:
        """One round: each token once, then each kernel's owner once."""
        by_token: dict[tuple[str, str], list[WebSocketHandler]] = {}
        for handler in self._open:
            key = handler.request.headers.get("Authorization", ""), _name(handler)
            by_token.setdefault(key, []).append(handler)
        places = asyncio.Semaphore(AT_ONCE)

        async def check_token(name: str, handlers: list[WebSocketHandler]) -> None:
            async with places:
                if not await self._is_known(handlers[0], name):
                    self._close(handlers, NOT_KNOWN)

        async def check_kernel(kernel_id: str) -> None:
            async with places:
                if reason := await self.why_not_member(kernel_id):
                    self._close([handler for handler, of in self._open.items() if of == kernel_id], reason)

        checks = [check_token(name, handlers) for (_token, name), handlers in by_token.items()]
        checks += [check_kernel(kernel_id) for kernel_id in set(self._open.values())]
        for result in await asyncio.gather(*checks, return_exceptions=True):
            if isinstance(result, Exception):
                self._log.error("a websocket is not checked now", exc_info=result)

    async def _is_known(self, handler: WebSocketHandler, name: str) -> bool:
        try:
            user = await self._provider.find_user_again(handler.request)
        except HTTPError as error:
            return error.status_code != 403
        return user is not None and user.username == name

    async def why_not_member(self, kernel_id: str) -> str:
        """Why the kernel's owner may not use it any more; "" otherwise, and for another gateway's kernel."""
        kernel = self._kernels.find_kernel(kernel_id)
        if kernel is None:
            return ""
        owner, name = self._kernels.owner_of(kernel_id), str(kernel.kernel_name)
        if await self._specs.reader.run(owner, self._specs.has_left, name, owner):
            return f"{owner} is not a member of the project of {name} any more"
        return ""

    def _close(self, handlers: Iterable[WebSocketHandler], reason: str) -> None:
        for handler in handlers:
            self._log.info("a websocket of %s is closed: %s", _name(handler), reason)
            handler.close(POLICY_VIOLATION, reason.encode()[:120].decode(errors="ignore"))


def _name(handler: WebSocketHandler) -> str:
    user = handler.current_user
    return user.username if isinstance(user, GatewayUser) else ""
