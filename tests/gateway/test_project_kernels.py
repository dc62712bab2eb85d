"""Projects with a real Slurm: members by account, and the jobs of their kernels."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from jupyter_client import AsyncKernelManager

from gateway_slurm.errors import NotAllowed, SlurmUnavailable
from gateway_slurm.gateway.specs.manager import GatewayKernelSpecManager
from gateway_slurm.gateway.specs.members import ask_accounts
from gateway_slurm.slurm.runner import Runner
from gateway_slurm.testing import PrivateCluster
from helpers.kernel_clients import JOB, READY, async_execute, jobid_of
from helpers.private_slurm import slurm

ROOT = Path(__file__).parents[2]
FORMAT = "--Format=Partition:20,NumNodes:8,TimeLimit:12,Account:12"


@pytest.fixture(scope="module")
def accounting() -> Iterator[PrivateCluster]:
    """A cluster with slurmdbd: the account ``demo`` has this user, ``Clim`` has ada and ben."""
    with (
        tempfile.TemporaryDirectory(prefix="gst-", dir="/tmp") as base,
        PrivateCluster(Path(base) / "s", nodes=1, accounting=True) as private,
    ):
        add = ["sacctmgr", "--immediate", "--quiet", "add"]
        slurm(*add, "account", "Clim", "Organization=private", cluster=private)
        for name in ("ada", "ben"):
            slurm(*add, "user", name, "Account=clim", cluster=private)
        yield private


def write(path: Path, content: object) -> None:
    """Write a JSON file and its directories."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project for the account ``clim``, with a kernelspec that wraps the installed python3."""
    root = tmp_path / "projects"
    project = {
        "account": "clim",
        "partitions": ["batch"],
        "limits": {"max_nodes": 2, "max_runtime": 20},
        "members": {"accounts": ["clim"]},
    }
    config = {"nodes": 1, "runtime": 10, "kernel_name": "python3"}
    stanza = {"provisioner_name": "slurm-provisioner", "config": config}
    write(root / "clim" / "project.json", project)
    write(root / "clim" / "python" / "kernel.json", {"display_name": "P", "metadata": {"kernel_provisioner": stanza}})
    return root


def test_slurm_says_who_has_which_account(accounting):
    """One sacctmgr for all users, as a thread of its own may call it."""
    accounts = ask_accounts(Runner(slurm_conf=str(accounting.slurm_conf)))
    assert accounts["ada"] == accounts["ben"] == {"clim"}
    assert "demo" in {account for names in accounts.values() for account in names}


async def test_a_members_account_opens_the_project(accounting, admin_settings, root):
    """From a worker thread of a running loop, as a server asks; a user without such an account sees no kernelspec."""
    admin_settings(slurm_conf=str(accounting.slurm_conf))
    specs = GatewayKernelSpecManager(projects_root=str(root), serve_installed=False)
    for user, names in (("ada", ["clim.python"]), ("zoe", [])):
        assert list(await asyncio.to_thread(specs.specs_for, user)) == names


def test_without_accounting_no_user_is_a_member_by_account(cluster, service, root):
    """A Slurm without slurmdbd gives no answer, which is none in favour of anybody."""
    with pytest.raises(SlurmUnavailable):
        ask_accounts(Runner())
    specs = GatewayKernelSpecManager(projects_root=str(root), serve_installed=False)
    assert "clim.python" not in specs.specs_for("ada")


async def test_a_projects_kernel_runs_with_its_fields_and_the_clients(cluster, service, kernelspecs, root):
    """Account and partition of the project, time of the client, kernel of the wrapped python3, which is not served."""
    project = json.loads((root / "clim" / "project.json").read_text())
    del project["members"]
    write(root / "clim" / "project.json", project)
    specs = GatewayKernelSpecManager(projects_root=str(root))
    fields = specs.request_fields("clim.python", "ada", {"KERNEL_SLURM_RUNTIME": "7"})
    env = specs.kernel_env("clim.python", {"KERNEL_MINE": "x", "KERNEL_SLURM_RUNTIME": "7"})
    manager = AsyncKernelManager(kernel_name="clim.python", kernel_spec_manager=specs)
    await manager.start_kernel(slurm_fields=fields, env={**os.environ, **env})
    client = manager.client()
    client.start_channels()
    try:
        await client.wait_for_ready(timeout=READY)
        assert await async_execute(client, JOB) == jobid_of(manager)
        seen = "print(os.environ['KERNEL_MINE'], 'KERNEL_SLURM_RUNTIME' in os.environ)"
        assert await async_execute(client, seen) == "x False"
        job = slurm("squeue", "--noheader", f"--jobs={jobid_of(manager)}", FORMAT, cluster=cluster).stdout.split()
        assert job == ["batch", "1", "7:00", "clim"]
    finally:
        client.stop_channels()
        await manager.shutdown_kernel()
    with pytest.raises(NotAllowed, match="max_runtime=20"):
        specs.request_fields("clim.python", "ada", {"KERNEL_SLURM_RUNTIME": "21"})


def test_the_shipped_projects_are_valid(tmp_path):
    """``kernelspecs/`` is a root of projects as it stands, and each kernelspec is within its project's limits."""
    shutil.copytree(ROOT / "kernelspecs", tmp_path / "kernelspecs")
    specs = GatewayKernelSpecManager(projects_root=str(tmp_path / "kernelspecs"), serve_installed=False)
    assert specs.problems() == []
    assert list(specs.specs_for("anybody")) == ["demo.gpu", "demo.python"]
    for name in specs.specs_for("anybody"):
        assert specs.request_fields(name, "anybody", {})["project"] == "demo"
