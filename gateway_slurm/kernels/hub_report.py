"""Kernel starts, told to a JupyterHub, in the form in which jupyter-slurm-provisioner does.

Only where the environment of the server says so: ``SLURM_PROVISIONER_JHUB_METRICS`` is the URL, and
``JUPYTERHUB_API_TOKEN``, which a hub sets, the proof. ``JUPYTERHUB_CERTIFICATE`` may name a CA's file.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from typing import Any, Final

from tornado.httpclient import HTTPClientError, HTTPRequest
from tornado.simple_httpclient import SimpleAsyncHTTPClient

from gateway_slurm.allocations.identity import JOB_NAME
from gateway_slurm.allocations.launcher import Launcher
from gateway_slurm.allocations.model import Allocation

URL: Final = "SLURM_PROVISIONER_JHUB_METRICS"
TOKEN: Final = "JUPYTERHUB_API_TOKEN"  # noqa: S105 - a variable's name
CERTIFICATE: Final = "JUPYTERHUB_CERTIFICATE"

TIMEOUT: Final = 10.0
"""Seconds that the hub may take for one report."""
UNDER_WAY: Final = 100
"""Reports that may be under way; more are dropped while the hub is that slow."""
_LARGEST_ANSWER = 64 << 10  # bytes
# A batch job's own step, which sacct calls "batch": it has no number, or SLURM_BATCH_SCRIPT (slurm.h),
# which 26.05 writes with a sign.
_BATCH_STEP = ("", str(0xFFFFFFFB), "-5")


def start_report(kernel_id: str, allocation: Allocation, launcher: Launcher) -> dict[str, Any]:
    """What a hub is told of a start; ``slurm_allocation_endtime`` is in seconds since the epoch, 0 for no limit."""
    jobid, info = allocation.jobid, allocation.info
    step = "batch" if launcher.stepid in _BATCH_STEP else launcher.stepid
    return {
        "kernel_id": kernel_id,
        "slurm_allocation_id": jobid,
        "slurm_allocation_name": info.name if info is not None and info.name else JOB_NAME,
        "slurm_allocation_nodelist": allocation.nodes,
        "slurm_allocation_node": launcher.node,
        "slurm_allocation_endtime": int(allocation.end_time or 0),
        "slurm_jobstep_id": f"{jobid}.{step}",
        "config": allocation.request.as_config(),
    }


class HubReports:
    """Sends reports from the loop that it is used on, which never waits for the hub.

    A report that fails is given up: the kernel runs all the same. The first failure is logged, and then none until a
    report has got through. ``close`` ends what is under way.
    """

    def __init__(self, url: str, token: str, *, certificate: str | None = None, log: logging.Logger) -> None:
        self._url, self._token, self._certificate, self._log = url, token, certificate, log
        self._client = SimpleAsyncHTTPClient(force_instance=True, max_body_size=_LARGEST_ANSWER)
        self._tasks: set[asyncio.Task[None]] = set()
        self._failed = False
        self._closed = False

    @classmethod
    def from_environment(cls, environment: Mapping[str, str], log: logging.Logger) -> HubReports | None:
        """None where the environment has no URL or no token."""
        url, token = environment.get(URL, ""), environment.get(TOKEN, "")
        if not url or not token:
            return None
        return cls(url, token, certificate=environment.get(CERTIFICATE) or None, log=log)

    def send(self, report: Mapping[str, Any]) -> None:
        """Send a report some time soon; returns at once and raises nothing."""
        if self._closed:
            return
        if len(self._tasks) >= UNDER_WAY:
            self._complain(f"{UNDER_WAY} reports are under way already")
            return
        task = asyncio.ensure_future(self._post(json.dumps(report)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _post(self, body: str) -> None:
        try:
            request = HTTPRequest(
                self._url,
                method="POST",
                body=body,
                headers={"Authorization": f"token {self._token}", "Content-Type": "application/json"},
                connect_timeout=TIMEOUT,
                request_timeout=TIMEOUT,
                ca_certs=self._certificate,
                # A redirect could carry the token to somebody else.
                follow_redirects=False,
            )
            await self._client.fetch(request)
        except HTTPClientError as error:
            self._complain(f"HTTP status {error.code}")
        except (OSError, ValueError) as error:
            self._complain(type(error).__name__)  # the message may have the URL, and in it a secret
        else:
            self._failed = False

    def _complain(self, what: str) -> None:
        if not self._failed:
            self._log.warning(
                "a kernel's start was not reported to the JupyterHub (%s); check %s. This is said once", what, URL
            )
        self._failed = True

    async def close(self) -> None:
        """Give up what is under way."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._client.close()
