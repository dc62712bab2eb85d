"""Reports of kernel starts to a JupyterHub, in the format of jupyter-slurm-provisioner.

The server's environment switches them on: ``SLURM_PROVISIONER_JHUB_METRICS`` is the URL, and the hub's own variable
``JUPYTERHUB_API_TOKEN`` authenticates the server. ``JUPYTERHUB_CERTIFICATE`` may name a file with the CA's certificate.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any, Final

from tornado.httpclient import HTTPClientError
from tornado.simple_httpclient import SimpleAsyncHTTPClient

from gateway_slurm._util import LogOnce, TaskSet
from gateway_slurm.allocations.identity import JOB_NAME
from gateway_slurm.allocations.launcher import Launcher
from gateway_slurm.allocations.model import Allocation

URL: Final = "SLURM_PROVISIONER_JHUB_METRICS"
TOKEN: Final = "JUPYTERHUB_API_TOKEN"  # noqa: S105 - a variable's name
CERTIFICATE: Final = "JUPYTERHUB_CERTIFICATE"

TIMEOUT: Final = 10.0
"""Seconds that the hub may take for one report."""
MAX_PENDING: Final = 100
"""Reports that may be under way; further ones are dropped while the hub is so slow."""
MAX_RESPONSE: Final = 64 << 10
"""Bytes of the hub's response."""
# The batch step, which sacct calls "batch", has no number, or SLURM_BATCH_SCRIPT (slurm.h), which 26.05 writes with a
# sign.
_BATCH_STEP = ("", str(0xFFFFFFFB), "-5")


def start_report(kernel_id: str, allocation: Allocation, launcher: Launcher) -> dict[str, Any]:
    """The report of a start; ``slurm_allocation_endtime`` is in seconds since the epoch, 0 for no limit."""
    jobid, info = allocation.jobid, allocation.info
    step = "batch" if launcher.stepid in _BATCH_STEP else launcher.stepid
    return {
        "kernel_id": kernel_id,
        "slurm_allocation_id": jobid,
        "slurm_allocation_name": (info.name if info is not None else "") or allocation.name or JOB_NAME,
        "slurm_allocation_nodelist": allocation.nodes,
        "slurm_allocation_node": launcher.node,
        "slurm_allocation_endtime": int(allocation.end_time or 0),
        "slurm_jobstep_id": f"{jobid}.{step}",
        "config": allocation.request.as_config(),
    }


class HubReports:
    """Sends reports in the background of the loop that it is used on; the service awaits ``close``.

    A failed report is not repeated: the kernel runs all the same. The log has the first failure, and a further one only
    after a report has succeeded.
    """

    def __init__(self, url: str, token: str, *, certificate: str | None = None, log: logging.Logger) -> None:
        self._url, self._token, self._certificate = url, token, certificate
        self._client = SimpleAsyncHTTPClient(force_instance=True, max_body_size=MAX_RESPONSE)
        self._tasks = TaskSet()
        self._complaints = LogOnce(log)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str], log: logging.Logger) -> HubReports | None:
        """The reports that these environment variables ask for; None without a URL or a token."""
        url, token = environment.get(URL, ""), environment.get(TOKEN, "")
        if not url or not token:
            return None
        return cls(url, token, certificate=environment.get(CERTIFICATE) or None, log=log)

    def send(self, report: Mapping[str, Any]) -> None:
        """Send a report soon; returns at once and raises nothing."""
        if len(self._tasks) >= MAX_PENDING:
            self._complain(f"{MAX_PENDING} reports are under way already")
        else:
            self._tasks.create_task(self._post(json.dumps(report)))

    async def _post(self, body: str) -> None:
        try:
            await self._client.fetch(
                self._url,
                method="POST",
                body=body,
                headers={"Authorization": f"token {self._token}", "Content-Type": "application/json"},
                connect_timeout=TIMEOUT,
                request_timeout=TIMEOUT,
                ca_certs=self._certificate,
                # A redirect could carry the token to another host.
                follow_redirects=False,
            )
        except HTTPClientError as error:
            self._complain(f"HTTP status {error.code}")
        except (OSError, ValueError) as error:
            self._complain(type(error).__name__)  # the message may have the URL, and in it a secret
        else:
            self._complaints.clear("hub")

    def _complain(self, what: str) -> None:
        self._complaints.warning(
            "hub",
            "a kernel's start was not reported to the JupyterHub (%s); check %s. Further failures are not logged",
            what,
            URL,
        )

    async def close(self) -> None:
        """Drop the reports that are under way."""
        await self._tasks.close()
        self._client.close()
