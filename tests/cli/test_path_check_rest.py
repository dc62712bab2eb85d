"""The path check of ``jupyter slurm doctor`` where Slurm is reached by its REST interface alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gateway_slurm.testing import PrivateCluster
from gateway_slurm.testing.processes import free_port
from helpers import rest_cluster
from helpers.doctor_cli import REQUEST, check_path, failed_at
from helpers.kernel_clients import write_admin_settings
from helpers.private_slurm import jobs_of

Settings = Callable[..., object]


@pytest.fixture(scope="module")
def cluster() -> Iterator[PrivateCluster]:
    """A cluster with slurmrestd, in place of the session's; Slurm's commands in this process do not reach it."""
    with rest_cluster.cluster_by_rest() as private:
        yield private


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch) -> None:
    """A store of the test's own."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def by_rest(cluster, kernelspecs, tmp_path) -> Iterator[Settings]:
    """Write the settings for this cluster, with changes."""
    command = rest_cluster.mint_command(cluster, tmp_path / "minted")
    settings = {"cluster": cluster.rest_url, "rest_token_command": command, "log_directory": str(tmp_path / "logs")}
    written: list[Path] = []
    yield lambda **changed: written.append(write_admin_settings(**{**settings, **changed}))
    written[0].unlink()


def test_every_step_passes(by_rest, cluster):
    """Version and partitions come from slurmrestd."""
    by_rest()
    output = check_path(*REQUEST)
    assert output.is_good, output.steps
    assert "speaks v0.0." in output.said("login")
    assert "batch" in output.said("slurm")
    assert "partition batch" in output.said("submit")
    assert jobs_of(cluster) == []


def test_a_token_that_is_refused_is_reported_with_the_setting(by_rest, tmp_path):
    """Whether slurmrestd does not accept it, or other users can read its file."""
    file = rest_cluster.write_token(tmp_path / "token", "eyJhbGciOiJIUzI1NiJ9.eyJzdW4iOiJyb290In0.x")
    by_rest(rest_token_command=[], rest_token_file=str(file))
    assert failed_at(check_path(*REQUEST), "slurm", "token has expired or is not valid", "rest_token_command")
    file.chmod(0o644)
    assert failed_at(check_path(*REQUEST), "login", str(file), "rest_token_file")


def test_a_port_without_a_listener_is_reported(by_rest):
    """With the setting to change."""
    by_rest(cluster=f"rest+http://127.0.0.1:{(port := free_port())}")
    assert failed_at(check_path(*REQUEST), "login", str(port), "SlurmService.cluster")
