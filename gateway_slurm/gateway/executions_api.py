"""``/api/kernels/{kernel_id}/executions``: what a kernel's cells have come to, for a page or a script that was away.

The gateway and a Jupyter server with ``SlurmMappingKernelManager`` answer the same. ``default_handlers`` are those of a
Jupyter server; the gateway has its own, with owners and other gateways.
"""

from __future__ import annotations

import json
from typing import Any

from jupyter_server.auth.decorator import authorized
from jupyter_server.base.handlers import APIHandler
from tornado import web

from gateway_slurm.gateway.executions import MAX

UUID = r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}"
KERNEL_ID = rf"(?P<kernel_id>{UUID})"
MSG_ID = r"(?P<msg_id>[^/]+)"


async def list_executions(handler: APIHandler, kernel_id: str) -> list[dict[str, Any]]:
    """The models, by the request's ``cell_id`` and ``limit``. Raises HTTPError 400, and 404 for an unknown kernel."""
    cell_id, limit = handler.get_query_argument("cell_id", None), handler.get_query_argument("limit", str(MAX))
    if not (limit.isascii() and limit.isdecimal() and 1 <= len(limit) <= 9 and int(limit)):
        raise web.HTTPError(400, "limit must be a number from 1")
    manager: Any = handler.kernel_manager
    found = await manager.frontends.executions(kernel_id)
    return [model for model in found if cell_id is None or model["cell_id"] == cell_id][: int(limit)]


async def one_execution(handler: APIHandler, kernel_id: str, msg_id: str) -> dict[str, Any]:
    """The model with the outputs. Raises HTTPError 404."""
    manager: Any = handler.kernel_manager
    found: dict[str, Any] | None = await manager.frontends.execution(kernel_id, msg_id)
    if found is None:
        raise web.HTTPError(404, "there is no such execution; the server remembers the last ones of each kernel")
    return found


class ServerExecutionsHandler(APIHandler):
    """``…/executions`` of a Jupyter server."""

    auth_resource = "kernels"

    @web.authenticated
    @authorized
    async def get(self, kernel_id: str) -> None:
        self.finish(json.dumps(await list_executions(self, kernel_id)))


class ServerExecutionHandler(APIHandler):
    """``…/executions/{msg_id}`` of a Jupyter server."""

    auth_resource = "kernels"

    @web.authenticated
    @authorized
    async def get(self, kernel_id: str, msg_id: str) -> None:
        self.finish(json.dumps(await one_execution(self, kernel_id, msg_id)))


# jupyter_server finds the table by this name.
default_handlers = [
    (rf"/api/kernels/{KERNEL_ID}/executions", ServerExecutionsHandler),
    (rf"/api/kernels/{KERNEL_ID}/executions/{MSG_ID}", ServerExecutionHandler),
]
