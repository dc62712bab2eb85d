"""A Jupyter server whose files no node has, as on a laptop: its directories are hints, and its kernels start."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from helpers.gateway_process import running_gateway, start, stop_all, until_dead, write_project
from helpers.kernel_clients import jupyter_files_in
from helpers.namespaces import with_own_directories
from helpers.notebook_server import Frontend, running_server

WHERE = "import os; print(os.getcwd(), os.environ['PWD'])"
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="directories that only one process has need root")


@pytest.fixture(scope="module")
def laptop(cluster, jupyter_base):
    """A Jupyter server with directories that no node has, its gateway, and a directory that the nodes have."""
    shared = jupyter_base / "shared"
    files = jupyter_base / "laptop" / "home"
    for directory in (shared, files):
        directory.mkdir(parents=True)
    with jupyter_files_in(jupyter_base), running_gateway(jupyter_base / "gateway") as gateway:
        projects = jupyter_base / "gateway" / "projects"
        write_project(projects, "shared", default_directory=str(shared))
        write_project(projects, "strict", fields={"directory": "/no/such/order"})
        with running_server(
            files.parent,
            f"--gateway-url={gateway.url}",
            environment={"JUPYTER_GATEWAY_AUTH_TOKEN": gateway.tokens["alice"]},
            root=files / "work",
            prefix=with_own_directories(files, "work/analysis"),
        ) as server:
            yield server, gateway, shared


async def session(server, path, name):
    """Open a notebook with this kernelspec, as JupyterLab does; return its kernel's id."""
    body = {"path": path, "name": Path(path).name, "type": "notebook", "kernel": {"name": name}}
    return (await server.json("POST", "/api/sessions", body))["kernel"]["id"]


async def test_a_directory_of_a_laptop_is_a_hint(laptop):
    """The kernel starts at home, or where its project says; the first cell and the model say so, and why."""
    server, gateway, shared = laptop
    alice, hidden = gateway.of("alice"), f"{server.log.parent}/home/work/analysis"
    for name, expected in (("physics.python", os.environ["HOME"]), ("shared.python", str(shared))):
        kernel_id = await session(server, f"analysis/{name}.ipynb", name)
        frontend = await Frontend.connect(server, kernel_id)
        first, second = [(await frontend.execute(WHERE))[1] for _cell in range(2)]
        frontend.close()
        assert second == f"{expected} {expected}"
        assert first.splitlines() == [first.splitlines()[0], second]
        model = (await alice.json("GET", f"/api/kernels/{kernel_id}"))["slurm"]["directory"]
        assert model["path"] == expected
        assert f"'{hidden}' (No such file or directory)" in model["why"]
        assert (
            first.splitlines()[0]
            == f"gateway_slurm: the kernel's working directory is {expected}, since {model['why']}"
        )
    await stop_all(alice)


async def test_a_kernelspecs_directory_is_an_order(laptop):
    """Where the node does not have it, the start fails and says so; where it has the client's, nothing is said."""
    _server, gateway, shared = laptop
    alice = gateway.of("alice")
    dead = await until_dead(alice, await start(alice, "strict.python"))
    assert "'/no/such/order' (No such file or directory)" in dead["reason"]
    kernel_id = await start(alice, "physics.python", env={"KERNEL_WORKING_DIR": str(shared)})
    frontend = await Frontend.connect(alice, kernel_id)
    assert (await frontend.execute(WHERE))[1] == f"{shared} {shared}"
    frontend.close()
    model = await alice.json("GET", f"/api/kernels/{kernel_id}")
    assert model["slurm"]["directory"] == {"path": str(shared), "why": ""}
    await stop_all(alice)
