"""The gateway's API beside kernels: allocations, who one is, how it does, health, and its own description."""

from __future__ import annotations

from typing import Any

from jupyter_server._tz import isoformat, utcfromtimestamp
from jupyter_server.auth.decorator import allow_unauthenticated, authorized
from jupyter_server.services.api.handlers import IdentityHandler
from tornado import web

from gateway_slurm.gateway.base import NOT_RESTORED, GatewayHandler
from gateway_slurm.gateway.merged import with_others
from gateway_slurm.gateway.openapi import description
from gateway_slurm.gateway.peers import ALLOCATIONS, KERNELS
from gateway_slurm.service import SlurmService

JOBID = r"(?P<jobid>[0-9]{1,10})"


class AllocationsHandler(GatewayHandler):
    """``/api/allocations``."""

    @property
    def whose(self) -> str | None:
        """Whose allocations are meant; None is everybody's, for admins."""
        return None if self.user.admin else self.user.username

    @web.authenticated
    @authorized
    async def get(self) -> None:
        """The user's allocations: jobs with their state, nodes, time and kernels."""
        self.answer(await with_others(self, ALLOCATIONS, SlurmService.instance().allocations_of(self.whose)))


class AllocationHandler(AllocationsHandler):
    """``/api/allocations/{jobid}``."""

    @web.authenticated
    @authorized
    async def get(self, jobid: str) -> None:
        """One allocation."""
        for allocation in SlurmService.instance().allocations_of(self.whose):
            if allocation["jobid"] == jobid:
                self.answer(allocation)
                return
        raise web.HTTPError(404, f"there is no allocation {jobid} of yours")

    @web.authenticated
    @authorized
    async def delete(self, jobid: str) -> None:
        """End it now, with its kernels."""
        service = SlurmService.instance()
        await service.run(service.cancel_allocation(self.whose, jobid))
        self.set_status(204)
        self.finish()


class AllocationActionHandler(AllocationsHandler):
    """``/api/allocations/{jobid}/keep`` and ``…/release``."""

    @web.authenticated
    @authorized
    async def post(self, jobid: str, action: str) -> None:
        """Let it stay after its last kernel, or take that back."""
        service = SlurmService.instance()
        change = service.keep_allocation if action == "keep" else service.release_allocation
        await service.run(change(self.whose, jobid))
        self.set_status(204)
        self.finish()


class StatusHandler(GatewayHandler):
    """``/api/status``."""

    _track_activity = False

    @web.authenticated
    @authorized
    async def get(self) -> None:
        """When the gateway started and was last used, and how many kernels and connections the user has."""
        models = await with_others(self, KERNELS, self.kernels.models_for(self.user))
        started = self.settings["started"].timestamp()
        self.answer(
            {
                "started": isoformat(utcfromtimestamp(started)),
                "last_activity": isoformat(self.kernels.last_kernel_activity),
                "kernels": len(models),
                "connections": sum(model["connections"] for model in models),
            }
        )


class MeHandler(GatewayHandler, IdentityHandler):
    """``/api/me``: Jupyter server's, with errors as everywhere here."""


class LiveHandler(GatewayHandler):
    """``/health/live``: the process answers."""

    _track_activity = False
    waits_for_kernels = False

    @allow_unauthenticated
    async def get(self) -> None:
        """Nothing but that it answers."""
        self.answer({"status": "live"})


class ReadyHandler(GatewayHandler):
    """``/health/ready``: the kernels of before are there, and others can be started."""

    _track_activity = False
    waits_for_kernels = False

    @allow_unauthenticated
    async def get(self) -> None:
        """Say 503 while launchers could not reach this gateway, and while it does not have its kernels of before."""
        reason = NOT_RESTORED
        if self.kernels.restorer.done.is_set():
            reason = await SlurmService.instance().run(_why_not_ready(SlurmService.instance()))
        if reason:
            self.set_header("Retry-After", "1")
        self.answer(
            {"status": "not ready", "reason": reason} if reason else {"status": "ready"}, 503 if reason else 200
        )


async def _why_not_ready(service: SlurmService) -> str:
    return await service.why_not_ready()


class DescriptionHandler(GatewayHandler):
    """``/api/spec.json``: this API, as OpenAPI."""

    _track_activity = False
    waits_for_kernels = False

    @allow_unauthenticated
    async def get(self) -> None:
        """The description; no secret is in it."""
        self.answer(description(self.base_url))


class UnknownHandler(GatewayHandler):
    """Whatever else there is not under ``/api`` and ``/kernelspecs``: those who ask expect JSON, also in a refusal."""

    _track_activity = False

    async def prepare(self) -> None:  # type: ignore[override] # tornado awaits what is awaitable
        """Say 404, to a user; others hear no more of it than of anything else."""
        await super().prepare()
        raise web.HTTPError(404, "there is nothing at this path; /api/spec.json describes what there is")


default_handlers: list[tuple[str, Any]] = [
    (r"/api/allocations", AllocationsHandler),
    (rf"/api/allocations/{JOBID}", AllocationHandler),
    (rf"/api/allocations/{JOBID}/(?P<action>keep|release)", AllocationActionHandler),
    (r"/api/status", StatusHandler),
    (r"/api/me", MeHandler),
    (r"/api/spec.json", DescriptionHandler),
    (r"/health/live", LiveHandler),
    (r"/health/ready", ReadyHandler),
    (r"/(?:api|kernelspecs)/.*", UnknownHandler),
]
