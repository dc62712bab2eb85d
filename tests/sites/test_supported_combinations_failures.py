"""What fails, and what is decided, by every way to Slurm and every way back: it is the same, and nothing is left.

docs/admins/networks.md has the table, and tests/unit/test_supported_combinations.py holds it against the tests here.
"""

from __future__ import annotations

import asyncio
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress

import psutil
import pytest
from jupyter_client import AsyncKernelManager

from gateway_slurm.errors import (
    AllocationError,
    GatewaySlurmError,
    KernelStartError,
    LauncherFailed,
    LinkError,
    QueueTimeout,
    SubmitRefused,
)
from gateway_slurm.kernels.model import Phase
from gateway_slurm.service import SlurmService
from helpers import kernel_clients, sites
from helpers.daemons import kill_daemon, start_daemon, stop_daemon
from helpers.failing_starts import SOON, all_nodes_taken, jobs_of_ours, start_error
from helpers.kernel_clients import KERNEL_NAMES, PID, READY, execute, jobid_of, poll_async, process_of, running_kernel
from helpers.private_slurm import jobs_of, poll, slurm
from helpers.sites import MODES, WAYS, Site

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

# In a process of its own: start a kernel, tell its process, and wait to be killed.
STARTS_ONE = """
import signal
from jupyter_client import KernelManager
manager = KernelManager(kernel_name={name!r})
manager.start_kernel()
print(manager.provisioner._handle.process.pid, flush=True)
signal.pause()
"""


@pytest.fixture(scope="module", params=WAYS)
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    """A cluster that is reached this way; this process is the server, on its host."""
    with sites.site(request.param) as one:
        yield one


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest, site: Site) -> str:
    """How clients reach kernels; the firewall lets nodes be dialled only where it is direct."""
    site.allow(request.param)
    return str(request.param)


@pytest.fixture(autouse=True)
def admin_settings(site: Site) -> Iterator[Callable[..., None]]:
    """Change the settings of the site's server; after each test there is no service, and nothing of its kernels."""

    def write(**changed: object) -> None:
        kernel_clients.forget_service()
        kernel_clients.write_admin_settings(**{**site.settings, **changed})

    write()
    yield write
    kernel_clients.forget_service()
    assert poll(lambda: site.left() == [], timeout=READY), site.left()


def test_a_node_gets_out_by_one_address_and_port_only(site, mode):
    """And is dialled only where the mode is direct: the site is what the other tests say that it is."""
    net, link, port = site.network, site.link, int(sites.KERNELS.partition("-")[0])
    listening = [(link.target, int(link.ports)), ("login", 4999), ("gateway", 4999), ("node", port)]
    with ExitStack() as stack:
        for host, number in listening:
            with net.entered(host):
                stack.enter_context(socket.create_server(("", number)))
        assert [one for one in listening[:3] if reaches(site, "node", *one)] == listening[:1]
        assert reaches(site, site.server, "node", port) == (mode == "direct")


def reaches(site, source, target, port):
    """Whether one host can dial another one's port."""
    with site.network.entered(source), suppress(OSError):
        socket.create_connection((site.network.hosts[target], port), timeout=0.3).close()
        return True
    return False


def test_auto_takes_the_way_that_the_network_has(site, mode):
    """A kernel that may be dialled, and could be, is direct where the firewall lets it be, and else tunnelled."""
    with running_kernel(site.install("asked", "auto")) as (_manager, client):
        assert sites.is_reached(site, mode, execute(client, sites.CONNECTION))


def test_a_job_that_slurm_refuses_is_an_error_at_once(site, mode):
    """In Slurm's words, or with its reason to let the job wait without a limit; there is no job."""
    wrong = (("partition", "nosuch"), ("nodes", 3), ("runtime", 31))
    for field, value in wrong:
        error, seconds = start_error(site.install("asked", mode, **{"partition": "devel", field: value}))
        assert isinstance(error, (SubmitRefused, AllocationError))
        assert field in str(error)
        assert seconds < SOON
        assert jobs_of(site.cluster) == []


def test_no_job_is_left_where_slurm_is_down(site, mode):
    """slurmctld is gone: an error that says so; the next start is good once it is back."""
    stop_daemon(site.cluster, "slurmctld")
    try:
        error, _seconds = start_error(KERNEL_NAMES[mode])
    finally:
        start_daemon(site.cluster, "slurmctld")
    assert re.search("controller|slurmctld", str(error), re.IGNORECASE)
    with running_kernel(KERNEL_NAMES[mode]) as (_manager, client):
        assert execute(client, "print(1)") == "1"


async def test_a_start_that_is_cancelled_in_the_queue_takes_its_job_along(site, mode):
    """And one that has waited too long; each time ``ready`` has the reason."""
    with all_nodes_taken(site.cluster, nodes=2):
        manager = AsyncKernelManager(kernel_name=KERNEL_NAMES[mode])
        starting = asyncio.ensure_future(manager.start_kernel())
        assert await poll_async(lambda: jobs_of_ours(site.cluster), timeout=20)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        with pytest.raises(GatewaySlurmError, match="cancelled"):
            await asyncio.wait_for(asyncio.wrap_future(manager.ready), 5)
        assert await poll_async(lambda: not jobs_of_ours(site.cluster), timeout=20)


def test_a_job_that_waits_too_long_is_given_up(site, mode, admin_settings):
    """After queue_timeout, with Slurm's reason."""
    admin_settings(queue_timeout=1.0)
    with all_nodes_taken(site.cluster, nodes=2):
        error, _seconds = start_error(KERNEL_NAMES[mode])
        assert isinstance(error, QueueTimeout)
        assert poll(lambda: not jobs_of_ours(site.cluster), timeout=20)


def test_what_is_not_on_the_node_is_named(site, mode, admin_settings, tmp_path):
    """The kernel's command; and pycryptodome, of which the launcher's Python has none."""
    error, _seconds = start_error(
        site.install("asked", mode, kernel_argv=["/no/such/kernel", "-f", "{connection_file}"])
    )
    assert isinstance(error, KernelStartError)
    assert "'/no/such/kernel'" in str(error)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path)], check=True, timeout=60)
    admin_settings(launcher_python=[f"{tmp_path}/bin/python"])
    error, _seconds = start_error(KERNEL_NAMES[mode])
    assert isinstance(error, LauncherFailed)
    assert "pycryptodome" in str(error)
    assert poll(lambda: site.left() == [], timeout=20), site.left()


def test_a_kernel_that_dies_at_start_is_quoted(site, mode):
    """How it ended, and what it printed last, are in the error, and its job is given back."""
    argv = [sys.executable, "-c", "print('out of luck'); raise SystemExit(3)"]
    error, _seconds = start_error(site.install("asked", mode, kernel_argv=argv))
    assert isinstance(error, KernelStartError)
    assert "exit code 3" in str(error)
    assert "out of luck" in str(error)
    assert poll(lambda: site.left() == [], timeout=20), site.left()


def test_a_node_that_cannot_dial_back_is_told_with_the_addresses(site, mode, admin_settings):
    """Where its one way out is closed the error names what it has tried."""
    admin_settings(link_timeout=1.0)
    with site.network.cut(site.link):
        error, _seconds = start_error(KERNEL_NAMES[mode])
        assert isinstance(error, LauncherFailed)
        assert f"{site.network.hosts[site.link.target]}:{site.link.ports}" in str(error)
        assert "within 1 s" in str(error)
    assert poll(lambda: site.left() == [], timeout=20), site.left()


def test_a_killed_kernel_is_known_and_restarted_in_its_job(site, mode):
    """kill -9 on the node is the kernel's end here; the same job and the same channels have the next one."""
    with running_kernel(KERNEL_NAMES[mode]) as (manager, client):
        jobid, pid = jobid_of(manager), execute(client, PID)
        psutil.Process(int(pid)).kill()
        assert poll(lambda: not manager.is_alive(), timeout=10)
        assert "SIGKILL" in manager.provisioner.exit_reason
        manager.restart_kernel(now=True)
        client.wait_for_ready(timeout=READY)
        assert execute(client, PID) != pid
        assert jobid_of(manager) == jobid


def test_no_kernel_outlives_its_launcher(site, mode):
    """kill -9 of the launcher ends its kernel on the node, and the reason is Slurm's."""
    with running_kernel(KERNEL_NAMES[mode]) as (manager, client):
        kernel = psutil.Process(int(execute(client, PID)))
        kernel.parent().kill()
        assert poll(lambda: not kernel.is_running() or kernel.status() == psutil.STATUS_ZOMBIE, timeout=10)
        assert poll(lambda: not manager.is_alive(), timeout=20)
        assert "FAILED" in manager.provisioner.exit_reason


def test_a_kernel_lives_on_without_its_slurmd(site, mode):
    """kill -9 of the node's slurmd is nothing to the kernel; it is stopped in good order afterwards."""
    with running_kernel(KERNEL_NAMES[mode]) as (manager, client):
        node = process_of(manager).launcher.node
        kill_daemon(site.cluster, node)
        try:
            assert execute(client, "print('still here')") == "still here"
            assert process_of(manager).phase is Phase.RUNNING
        finally:
            start_daemon(site.cluster, node)
    assert poll(lambda: site.cluster.status().nodes.get(node) == "idle", timeout=30)


def test_a_kernel_out_of_reach_is_not_dead(site, mode, admin_settings):
    """Neither link nor Slurm can be reached: nothing is known, an interrupt is an error, and then it is there again."""
    admin_settings(heartbeat=0.5)
    with running_kernel(KERNEL_NAMES[mode]) as (manager, client):
        execute(client, "kept = 12")
        process = process_of(manager)
        with site.network.cut(site.link, *site.way_to_slurm):
            assert poll(lambda: process.phase is Phase.LOST, timeout=20)
            with pytest.raises(LinkError, match="down"):
                manager.interrupt_kernel()
            assert manager.is_alive()
        assert poll(lambda: process.phase is Phase.RUNNING, timeout=30)
        assert execute(client, "print(kept)") == "12"


def test_a_cancelled_job_is_told_as_such(site, mode):
    """scancel by another process ends the kernel, and Slurm's report is the reason."""
    with running_kernel(KERNEL_NAMES[mode]) as (manager, _client):
        slurm("scancel", jobid_of(manager), cluster=site.cluster)
        assert poll(lambda: not manager.is_alive(), timeout=20)
        assert poll(lambda: "CANCELLED" in manager.provisioner.exit_reason, timeout=20)
        with pytest.raises(Exception, match=f"job {jobid_of(manager)}"):
            manager.restart_kernel(now=True)


def test_a_node_that_dies_ends_its_kernel(site, mode, admin_settings):
    """Slurm's NODE_FAIL is the reason; should the node come back, its launcher has ended what it had."""
    admin_settings(heartbeat=0.5, orphan_timeout=1.0)
    with running_kernel(KERNEL_NAMES[mode]) as (manager, _client):
        node = process_of(manager).launcher.node
        with site.network.away("node"):
            assert poll(lambda: process_of(manager).phase is Phase.LOST, timeout=20)
            assert manager.is_alive()
            slurm("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test", cluster=site.cluster)
            assert poll(lambda: not manager.is_alive(), timeout=30)
            assert poll(lambda: "NODE_FAIL" in manager.provisioner.exit_reason, timeout=20)
    assert poll(lambda: site.left() == [], timeout=30), site.left()
    # Refused where the node has been heard of meanwhile.
    slurm("scontrol", "update", f"NodeName={node}", "State=RESUME", cluster=site.cluster, check=False)
    assert poll(lambda: site.cluster.status().nodes.get(node) == "idle", timeout=30)


def test_a_server_that_is_killed_leaves_nothing_for_long(site, mode, admin_settings):
    """A launcher that hears of no server for orphan_timeout ends its kernel and its job; the next server clears up."""
    admin_settings(orphan_timeout=1.0)
    argv = [sys.executable, "-c", STARTS_ONE.format(name=KERNEL_NAMES[mode])]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            assert psutil.pid_exists(int(server.stdout.readline()))
        finally:
            server.send_signal(signal.SIGKILL)
    assert poll(lambda: site.left_on_the_cluster() == [], timeout=40), site.left_on_the_cluster()
    service = SlurmService.instance()
    service.submit(service.open()).result(READY)
    assert site.left() == []
