"""Reports of kernel starts to a JupyterHub, in the form of jupyter-slurm-provisioner."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from helpers.kernel_clients import JOB, READY, execute, install_kernelspec, jobid_of, running_kernel
from helpers.private_slurm import poll, slurm

TOKEN = "the-hubs-secret"  # noqa: S105 - only here


@dataclass
class Recorder:
    """Stands in for a hub's metrics: what came, and how it answers."""

    url: str = ""
    status: int = 200
    came: list[tuple[str | None, dict[str, object]]] = field(default_factory=list)
    held: threading.Event = field(default_factory=threading.Event)

    def until(self, count: int) -> list[dict[str, object]]:
        """The reports, once there are so many."""
        assert poll(lambda: len(self.came) >= count, timeout=READY)
        return [report for _authorization, report in self.came]


@pytest.fixture
def hub() -> Iterator[Recorder]:
    """An HTTP server that answers at once, unless ``held`` is cleared."""
    recorder = Recorder()
    recorder.held.set()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            recorder.came.append((self.headers["Authorization"], body))
            recorder.held.wait(READY)
            self.send_response(recorder.status)
            self.send_header("Location", recorder.url)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    recorder.url = f"http://127.0.0.1:{server.server_port}/hub/metrics"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield recorder
    recorder.held.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def reporting(hub, service, monkeypatch, caplog):
    """The hub, which this process reports to, and the log that it keeps."""
    monkeypatch.setenv("SLURM_PROVISIONER_JHUB_METRICS", hub.url)
    monkeypatch.setenv("JUPYTERHUB_API_TOKEN", TOKEN)
    caplog.set_level(logging.DEBUG)
    caplog.handler.setLevel(logging.DEBUG)
    service.log = logging.getLogger("reporting")
    return hub


def complaints(caplog) -> list[str]:
    """What the log says of reports that failed."""
    return [record.getMessage() for record in caplog.records if "was not reported" in record.getMessage()]


def test_each_start_is_reported(reporting, caplog):
    """A start and a restart send the kernel, its job, nodes, end, step and request fields, with the hub's token."""
    with running_kernel("slurm") as (manager, client):
        (report,) = reporting.until(1)
        assert reporting.came[0][0] == f"token {TOKEN}"
        jobid = jobid_of(manager)
        end = report.pop("slurm_allocation_endtime")
        config = report.pop("config")
        assert report == {
            "kernel_id": manager.kernel_id,
            "slurm_allocation_id": jobid,
            "slurm_allocation_name": "slurm",
            "slurm_allocation_nodelist": [manager.provisioner.node],
            "slurm_allocation_node": manager.provisioner.node,
            "slurm_jobstep_id": f"{jobid}.batch",
        }
        assert isinstance(end, int)
        assert 0 < end - time.time() <= 600
        assert (config["partition"], config["runtime"]) == ("batch", 10)
        manager.restart_kernel()
        client.wait_for_ready(timeout=READY)
        again = reporting.until(2)[1]
        assert (again["kernel_id"], again["slurm_allocation_id"]) == (manager.kernel_id, jobid)
    assert TOKEN not in caplog.text


def test_a_kernel_in_an_adopted_job_is_reported_with_its_step(reporting, cluster, kernelspecs):
    """The name is that of the adopted job, and the step is one that Slurm lists."""
    argv = ["sbatch", "--parsable", "--job-name=mine", "--time=10", "--wrap=sleep 300"]
    jobid = slurm(*argv, cluster=cluster).stdout.strip()
    install_kernelspec(kernelspecs, "there", config_overrides={"jobid": jobid})
    with running_kernel("there") as (_manager, client):
        assert execute(client, JOB) == jobid
        (report,) = reporting.until(1)
        steps = slurm("squeue", "--noheader", "--steps", f"--job={jobid}", "--format=%i", cluster=cluster).stdout
    slurm("scancel", jobid, cluster=cluster)
    assert (report["slurm_allocation_id"], report["slurm_allocation_name"]) == (jobid, "mine")
    assert report["slurm_jobstep_id"] in steps.split()


@pytest.mark.parametrize("status", [302, 500])
def test_a_hub_that_fails_fails_no_start(reporting, caplog, status):
    """The kernels run, the log says it once and without the token, and no redirect is followed with it."""
    reporting.status = status
    for count in (1, 2):
        with running_kernel("slurm") as (manager, client):
            assert execute(client, JOB) == jobid_of(manager)
            reporting.until(count)
            assert poll(lambda: complaints(caplog) != [], timeout=READY)
    assert len(reporting.came) == 2
    assert len(complaints(caplog)) == 1
    assert str(status) in complaints(caplog)[0]
    assert TOKEN not in caplog.text


def test_a_hub_that_does_not_answer_holds_nothing_up(reporting, service):
    """While it is silent kernels start and stop, and the service closes without waiting for it."""
    reporting.held.clear()
    with running_kernel("slurm") as (manager, client):
        reporting.until(1)
        assert execute(client, JOB) == jobid_of(manager)
    began = time.monotonic()
    service.close()
    assert time.monotonic() - began < 9  # the report's own deadline is 10 s after its start


def test_a_url_that_is_none_is_no_start_error(reporting, caplog, monkeypatch):
    """A variable with nonsense costs one line in the log."""
    monkeypatch.setenv("SLURM_PROVISIONER_JHUB_METRICS", "nonsense")
    with running_kernel("slurm") as (manager, client):
        assert execute(client, JOB) == jobid_of(manager)
        assert poll(lambda: complaints(caplog) != [], timeout=READY)


def test_without_the_variables_nothing_is_sent(hub, service, monkeypatch):
    """A token alone, which every server of a hub's has, sends nothing."""
    monkeypatch.setenv("JUPYTERHUB_API_TOKEN", TOKEN)
    with running_kernel("slurm") as (manager, client):
        assert execute(client, JOB) == jobid_of(manager)
    assert hub.came == []
