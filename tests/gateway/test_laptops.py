"""A Jupyter server whose files no node has, as on a laptop: its directories are hints, and its kernels start."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import nbformat.v4 as nbf
import pytest

from helpers.gateway_process import running_gateway, start, stop_all, until_dead, write_project
from helpers.jupyterlab import LAB_OPTIONS, Page
from helpers.kernel_clients import jupyter_files_in
from helpers.namespaces import with_own_directories
from helpers.notebook_server import Frontend, running_server
from helpers.restarting_servers import lasting_gateway

WHERE = "import os; print(os.getcwd(), os.environ['PWD'])"
AWAY = 47.0  # seconds without a gateway
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
            *LAB_OPTIONS,
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


@pytest.mark.slow
async def test_jupyterlab_shows_the_reason_under_the_first_cell(laptop, tmp_path):
    """In a real browser: once, and the kernel runs."""
    server, gateway, _shared = laptop
    notebook = nbf.new_notebook(cells=[nbf.new_code_cell(WHERE), nbf.new_code_cell(WHERE)])
    notebook.metadata["kernelspec"] = {"name": "physics.python", "display_name": "Python", "language": "python"}
    await server.json("PUT", "/api/contents/analysis/page.ipynb", {"type": "notebook", "content": notebook})
    page, home = Page(server, tmp_path / "profile"), os.environ["HOME"]
    try:
        page.open("analysis/page.ipynb")
        page.until_idle()
        for number in range(2):
            page.run(number)
            page.until(
                lambda number=number: f"{home} {home}" in page.outputs()[-1] and number < len(page.outputs()),
                "no output",
            )
        page.until(lambda: len(page.outputs()) == 3, "there are not three outputs")
        note, *printed = page.outputs()
        assert note.startswith(f"gateway_slurm: the kernel's working directory is {home}, since node")
        assert "home/work/analysis' (No such file or directory)" in note
        assert printed == [f"{home} {home}"] * 2
    finally:
        page.browser.save_screenshot(str(tmp_path / "last.png"))
        page.close()
        await stop_all(gateway.of("alice"))


@pytest.mark.slow
async def test_a_gateway_that_is_away_for_longer_than_half_a_minute_is_not_noticed(cluster, jupyter_base, tmp_path):
    """With the settings of etc/client the page's own websocket goes on; by default it gives up after 31 to 36 s."""
    patience = ["--GatewayClient.gateway_retry_max=120", "--GatewayClient.gateway_retry_interval_max=5.0"]
    with jupyter_files_in(jupyter_base), lasting_gateway(tmp_path / "gateway") as gateway:
        environment = {"JUPYTER_GATEWAY_AUTH_TOKEN": gateway.of("alice").token}
        (tmp_path / "client").mkdir()
        with running_server(
            tmp_path / "client", f"--gateway-url={gateway.url}", *patience, environment=environment
        ) as server:
            kernel_id = await session(server, "a.ipynb", "physics.python")
            frontend = await Frontend.connect(server, kernel_id)
            assert (await frontend.execute("x = 41"))[0]["status"] == "ok"
            gateway.signal(signal.SIGKILL)
            await asyncio.sleep(AWAY)
            gateway.begin()
            gateway.until_listening()
            await frontend.until_ready()
            assert (await frontend.execute("print(x + 1)"))[1] == "42"
            frontend.close()
            await stop_all(gateway.of("alice"))
