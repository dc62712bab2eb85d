"""Cluster access from the admin's settings, with and without the REST interface."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any, cast

import pytest
from traitlets import TraitError

from gateway_slurm.access import cluster_access
from gateway_slurm.allocations.launcher import LauncherSteps
from gateway_slurm.config import ServiceSettings
from gateway_slurm.errors import ConfigError, SlurmNotInstalled, StepsUnknown
from gateway_slurm.link.server import ResponseSocket
from gateway_slurm.service import SlurmService
from gateway_slurm.slurm.driver import CommandLineDriver
from gateway_slurm.slurm.model import JobInfo, StepInfo
from gateway_slurm.slurm.rest.driver import RestDriver
from gateway_slurm.slurm.sudo.runner import SudoRunner, process_user

TOKENS = {"rest_token_file": "/nonexistent/token"}
URL = "rest+http://127.0.0.1:6820"


def settings(**traits: Any) -> ServiceSettings:
    """The admin's settings, with a log that the tests read."""
    made = ServiceSettings(**traits)
    made.log = logging.getLogger("test_rest_access")
    return made


def test_without_a_rest_interface_nothing_is_made_for_one() -> None:
    """By default Slurm's commands on this machine are used."""
    access = cluster_access(settings(slurm_path="/nonexistent", rest_user="ann"))
    assert access.user == process_user()
    assert isinstance(access.driver(access.user), CommandLineDriver)
    assert access.environment({"HOME": os.environ["HOME"]}) == {"HOME": os.environ["HOME"]}
    with pytest.raises(SlurmNotInstalled):
        access.check()


def test_another_users_commands_are_run_by_the_helper() -> None:
    """They are counted with the process's own commands."""
    access = cluster_access(settings())
    driver = access.driver("another-user")
    assert isinstance(driver, CommandLineDriver)
    assert isinstance(driver.runner, SudoRunner)
    assert driver.runner.user == "another-user"
    assert driver.runner.counts is access.runner.counts


def test_with_one_no_command_is_needed() -> None:
    """The drivers use REST, with Slurm's name for this process's user; kernels get the nodes' home directories."""
    access = cluster_access(settings(cluster=URL, slurm_path="/nonexistent", rest_user="ann", **TOKENS))
    access.check()
    assert access.user == "ann"
    for user in ("ann", "bob"):
        driver = access.driver(user)
        assert isinstance(driver, RestDriver)
        assert driver.user == user
        assert not driver.can_adopt
    assert access.environment({"HOME": os.environ["HOME"], "LANG": "C"}) == {"LANG": "C"}
    assert cluster_access(settings(cluster=URL, **TOKENS)).user == process_user()


async def test_drivers_find_the_launchers_of_a_service_that_came_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a launcher the steps of a running job are not known; with one, the launcher lists them."""

    async def jobs(_driver: RestDriver, _jobids: list[str]) -> dict[str, JobInfo]:
        return {}

    monkeypatch.setattr(RestDriver, "jobs", jobs)

    class Inside:
        async def list_steps(self, jobid: str) -> list[StepInfo]:
            return [StepInfo(stepid=f"{jobid}.0", user="ann", nodes="n1", name="work")]

    access = cluster_access(settings(cluster=URL, **TOKENS))
    driver = access.driver(access.user)
    with pytest.raises(StepsUnknown, match="no launcher of this server"):
        await driver.steps("12")
    access.find_launcher = lambda jobid: cast(LauncherSteps, Inside()) if jobid == "12" else None
    assert [step.stepid for step in await driver.steps("12")] == ["12.0"]


@pytest.mark.parametrize("tokens", [{}, {**TOKENS, "rest_token_command": ["x"]}])
def test_exactly_one_source_of_tokens_is_required(tokens: dict[str, Any]) -> None:
    """None or both is an error that names the settings."""
    with pytest.raises(ConfigError, match="rest_token_file and rest_token_command"):
        cluster_access(settings(cluster=URL, **tokens))


@pytest.mark.parametrize(
    ("url", "warned"),
    [
        ("rest+http://slurm.example.org:6820", True),
        ("rest+http://192.0.2.1:6820", True),
        ("rest+https://slurm.example.org:6820", False),
        ("rest+http://localhost:6820", False),
        ("rest+http://127.0.0.1:6820", False),
        ("rest+http://[::1]:6820", False),
    ],
)
async def test_tokens_that_go_unencrypted_are_warned_of(
    url: str, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The warning is for another machine without TLS."""
    access = cluster_access(settings(cluster=url, **TOKENS))
    await access.open(ResponseSocket(log=logging.getLogger("test_rest_access")).connected, lambda: None)
    await access.close()
    assert ("unencrypted" in caplog.text) == warned


@pytest.mark.parametrize("name", ["-x", "a b", "a/b", "a\nb"])
def test_a_user_has_a_name(name: str) -> None:
    """Text that could be an option, a path or a header's end is not a user's name."""
    with pytest.raises(TraitError, match="rest_user"):
        settings(rest_user=name)


def test_the_access_to_slurm_logs_where_its_service_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where no application is: the program's own log has the warnings about the cluster."""
    config = "c = get_config()\nc.SlurmService.cluster = 'ssh://login.example.org'\n"
    (tmp_path / "jupyter_slurm_config.py").write_text(config)
    monkeypatch.setenv("JUPYTER_CONFIG_DIR", str(tmp_path))
    monkeypatch.setattr(SlurmService, "_instance", None)
    log = logging.getLogger("test.papermill")
    service = SlurmService.instance(log)
    assert service.log is service.access.log is service.runner.connection.log is log
