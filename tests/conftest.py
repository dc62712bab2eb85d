"""Fixtures for all tests: one private Slurm for the session, and a check that no test leaves a job behind."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from jupyter_client import KernelManager

from gateway_slurm.service import SlurmService
from gateway_slurm.testing import PrivateCluster
from helpers import kernel_clients, slurm_accesses
from helpers.login_node import LoginNode, login_node, sessions
from helpers.postgres import PrivatePostgres, private_postgres
from helpers.private_slurm import jobs_of, poll, private_cluster, slurm

# The tests share two cores with a whole Slurm, so an example's duration means nothing. In CI the examples are the same
# in each run; elsewhere hypothesis looks for new ones.
hypothesis.settings.register_profile("shared", deadline=None, derandomize=os.environ.get("CI") == "true")
hypothesis.settings.load_profile("shared")

# These tests create Unix users, firewall rules, network namespaces or mounts, and so need root.
_ROOT_ONLY = [
    "gateway/hostile/test_attacks.py",
    "gateway/test_as_user.py",
    "kernels/failures/test_temporary_directories.py",
    "kernels/test_rest_users.py",
    "kernels/test_run_as_user.py",
    "sites/test_firewalled_nodes.py",
    "sites/test_server_networks.py",
    "sites/test_supported_combinations.py",
    "sites/test_supported_combinations_failures.py",
    "slurm/test_slurm_rootfs.py",
    "slurm/test_ssh_prompts.py",
]
collect_ignore = [] if os.geteuid() == 0 else _ROOT_ONLY

# Seconds since the epoch after which no slow test starts; .ci/run sets it.
_SLOW_UNTIL = float(os.environ.get("SLOW_UNTIL", "inf"))

_JOBS_GONE_WITHIN = 10.0  # seconds: KillWait is 5


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip slow tests after SLOW_UNTIL; the summary reports them."""
    if item.get_closest_marker("slow") is not None and time.time() > _SLOW_UNTIL:
        pytest.skip("no time is left for slow tests (SLOW_UNTIL)")


def _encodable(value: Any) -> Any:
    """The value with texts that can be encoded as UTF-8."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_encodable(name): _encodable(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_encodable(item) for item in value)
    return value


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Iterator[Any]:
    """Make the report of a test worker encodable, even if a log in it has half a surrogate pair."""
    return _encodable((yield))


@pytest.fixture(scope="session")
def cluster() -> Iterator[PrivateCluster]:
    """A private cluster for all tests; SLURM_CONF names it."""
    before = os.environ.get("SLURM_CONF")
    with private_cluster() as private:
        os.environ.update(private.environment())
        try:
            yield private
        finally:
            if before is None:
                del os.environ["SLURM_CONF"]
            else:
                os.environ["SLURM_CONF"] = before


@pytest.fixture(autouse=True)
def no_job_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves jobs in the session's cluster.

    Jobs that existed before the test do not count, such as a kernel that the tests of a class share.
    """
    used = "cluster" in request.fixturenames
    private: PrivateCluster | None = request.getfixturevalue("cluster") if used else None
    before = {line.split()[0] for line in jobs_of(private)} if private is not None else set()
    yield
    if private is None:
        return

    def left() -> list[str]:
        return [line for line in jobs_of(private) if line.split()[0] not in before]

    if poll(lambda: left() == [], timeout=_JOBS_GONE_WITHIN):
        return
    remaining = left()
    slurm("scancel", *(line.split()[0] for line in remaining), cluster=private, check=False)
    poll(lambda: left() == [], timeout=_JOBS_GONE_WITHIN)
    pytest.fail(f"the test left jobs in the queue: {remaining}")


@pytest.fixture(autouse=True)
def no_control_socket_left() -> Iterator[None]:
    """Close the control sockets of kernel managers that a test abandons; otherwise their ZMQ context blocks."""
    connected: list[KernelManager] = []
    connect = KernelManager._connect_control_socket

    def connect_on_record(manager: KernelManager) -> None:
        connect(manager)
        connected.append(manager)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KernelManager, "_connect_control_socket", connect_on_record)
        yield
    for manager in connected:
        manager._close_control_socket()


@pytest.fixture(scope="session")
def postgres() -> Iterator[PrivatePostgres]:
    """A private PostgreSQL for the test run; each test takes its own database from it."""
    with private_postgres() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest) -> str:
    """An empty store of each kind, as a value for ``SlurmService.store_url``; SQLite's is in the state directory."""
    return "" if request.param == "sqlite" else str(request.getfixturevalue("postgres").new_database())


@pytest.fixture(scope="session")
def jupyter_base() -> Iterator[Path]:
    """A directory with a short path for HOME and Jupyter's directories, for tests that start kernels."""
    base = Path(tempfile.mkdtemp(prefix="gsj-", dir="/tmp"))
    yield base
    shutil.rmtree(base, ignore_errors=True)


@pytest.fixture(scope="module")
def gateway_environment(cluster: PrivateCluster, jupyter_base: Path) -> Iterator[Path]:
    """HOME and Jupyter's directories for a module's gateways."""
    with kernel_clients.jupyter_files_in(jupyter_base):
        yield jupyter_base


@pytest.fixture
def kernelspecs(jupyter_base: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory of JUPYTER_PATH with the kernelspecs ``slurm`` (tunnel) and ``slurm-direct``; tests may add more."""
    for name, value in kernel_clients.jupyter_environment(jupyter_base).items():
        monkeypatch.setenv(name, value)
    directory = jupyter_base / "path"
    kernel_clients.install_both(directory)
    yield directory
    shutil.rmtree(directory / "kernels")


@pytest.fixture
def service(cluster: PrivateCluster, kernelspecs: Path) -> Iterator[SlurmService]:
    """A new service of this process; the service that exists after the test is closed."""
    kernel_clients.forget_service()
    kernel_clients.forget_dead_servers()
    yield SlurmService.instance()
    kernel_clients.forget_service()


@pytest.fixture
def admin_settings(service: SlurmService) -> Iterator[Callable[..., SlurmService]]:
    """Write ``jupyter_slurm_config.py``: ``admin_settings(connect="tunnel")`` returns a service with that setting."""
    written: list[Path] = []

    def write(**traits: object) -> SlurmService:
        kernel_clients.forget_service()
        written.append(kernel_clients.write_admin_settings(**traits))
        return SlurmService.instance()

    yield write
    for path in written:
        path.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def node() -> Iterator[LoginNode]:
    """A login node that forwards nothing."""
    with login_node() as node:
        yield node


@pytest.fixture(params=slurm_accesses.ACCESSES)
def access(
    request: pytest.FixtureRequest,
    cluster: PrivateCluster,
    kernelspecs: Path,
    admin_settings: Callable[..., SlurmService],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[slurm_accesses.SlurmAccess]:
    """An access to Slurm: each test that asks for it runs by Slurm's commands, over SSH and by REST.

    The module's ``cluster`` must have slurmrestd. By REST no command of Slurm's in this process finds the cluster.
    After a test over SSH nothing runs on the login node.
    """
    name, node = str(request.param), None
    if name == slurm_accesses.REST:
        monkeypatch.delenv("SLURM_CONF")
        slurm_accesses.keep_ipython_out_of_home(kernelspecs)
    elif name == slurm_accesses.SSH:
        node = request.getfixturevalue("node")
    settings = slurm_accesses.settings_of(name, cluster, node, tmp_path)
    yield slurm_accesses.SlurmAccess(name, settings, admin_settings)
    if node is not None:
        if SlurmService._instance is not None:
            SlurmService._instance.close()
        assert poll(lambda: sessions(node) == [], timeout=15), sessions(node)


@pytest.fixture(params=["tunnel", "direct"])
def mode(request: pytest.FixtureRequest) -> str:
    """How clients reach kernels; tests with this fixture run with both values."""
    return str(request.param)


@pytest.fixture
def kernel_name(mode: str) -> str:
    """The kernelspec for ``mode``."""
    return kernel_clients.KERNEL_NAMES[mode]
