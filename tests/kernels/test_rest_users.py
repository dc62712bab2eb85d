"""Kernels of several Unix users by Slurm's REST interface: each user's by a token of theirs, without sudo.

Needs root, which makes the users; collected only then (see conftest.py).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from gateway_slurm.testing import PrivateCluster
from helpers import rest_cluster
from helpers.daemons import slurm_token
from helpers.kernel_clients import READY
from helpers.private_slurm import jobs_of, poll, slurm
from helpers.unix_users import GatewayError, GatewayProcess, People, people

WHOAMI = "import getpass, os, pwd; print(pwd.getpwuid(os.geteuid()).pw_name, getpass.getuser(), os.environ['HOME'])"


@pytest.fixture(scope="module")
def cluster() -> Iterator[PrivateCluster]:
    """In place of the session's cluster: one with slurmrestd."""
    with rest_cluster.cluster_by_rest() as private:
        yield private


@pytest.fixture(scope="module")
def folk(cluster) -> Iterator[People]:
    """Two users, and the gateway's account."""
    with people(cluster) as found:
        yield found


def give_token(folk: People, cluster: PrivateCluster, user: str) -> None:
    """Put a token of the user's where only the gateway's account reads it."""
    directory = folk.base / "tokens"
    directory.mkdir(mode=0o755, exist_ok=True)
    path = rest_cluster.write_token(directory / f"{user}.jwt", slurm_token(cluster, user))
    shutil.chown(path, folk.gateway, folk.gateway)


@pytest.fixture
def gateway(folk, cluster) -> Iterator[GatewayProcess]:
    """A service in a process of the gateway's account, which has a token for itself and for one of the users."""
    for user in (folk.gateway, folk.ada):
        give_token(folk, cluster, user)
    tokens = str(folk.base / "tokens" / "{user}.jwt")
    process = GatewayProcess(
        folk, cluster, cluster=cluster.rest_url, rest_token_file=tokens, as_user_command=["{user}"]
    )
    yield process
    process.close()


def test_each_users_kernels_are_theirs_to_slurm(folk, gateway, cluster):
    """The token's user owns the jobs; another user's are not joined; a user without a token gets no job."""
    with pytest.raises(GatewayError, match=r"SlurmUnavailable: .*1bob\$\.jwt"):
        gateway.ask("start", kernel="two", owner=folk.bob)
    give_token(folk, cluster, folk.bob)
    jobs = {}
    for name in (folk.ada, folk.bob):
        jobs[name] = gateway.ask("start", kernel=name, owner=name)["jobid"]
        said = slurm("squeue", "--noheader", f"--jobs={jobs[name]}", "--format=%u", cluster=cluster).stdout
        assert said.strip() == name
        assert gateway.ask("execute", kernel=name, code=WHOAMI) == f"{name} {name} {folk.home(name)}"
    with pytest.raises(GatewayError, match="is not a job of yours"):
        gateway.ask("start", kernel="three", owner=folk.ada, fields={"jobid": jobs[folk.bob]})
    beside = gateway.ask("start", kernel="three", owner=folk.bob, fields={"jobid": jobs[folk.bob]})
    assert beside["jobid"] == jobs[folk.bob]
    for name in (folk.ada, folk.bob, "three"):
        gateway.ask("shutdown", kernel=name)
    assert poll(lambda: jobs_of(cluster) == [], timeout=READY)
