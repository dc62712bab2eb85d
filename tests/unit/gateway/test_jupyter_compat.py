"""The private members of jupyter_client and jupyter_server that the package uses do what it relies on."""

from __future__ import annotations

import ast
import asyncio
import importlib
import inspect
import json
import os
import pkgutil
import textwrap
from functools import cache
from pathlib import Path

import jupyter_client
import jupyter_server
import pytest
from jupyter_client.ioloop import AsyncIOLoopKernelManager
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_server.base.handlers import APIHandler
from jupyter_server.serverapp import ServerApp
from jupyter_server.services.kernels.kernelmanager import AsyncMappingKernelManager
from tornado.httpserver import HTTPServer
from tornado.ioloop import PeriodicCallback

import gateway_slurm
from gateway_slurm import _jupyter_compat
from gateway_slurm.gateway import jupyter_compat
from helpers.kernel_clients import poll_async

PACKAGE = Path(gateway_slurm.__file__).parent
ADAPTERS = {PACKAGE / "_jupyter_compat.py", PACKAGE / "gateway" / "jupyter_compat.py"}


@pytest.fixture
def kernelspecs(tmp_path):
    """A kernelspec "sleep", whose process runs and listens on nothing, and "false", whose program does not exist."""
    for name, program in (("sleep", "sleep"), ("false", "/no/such/program")):
        directory = tmp_path / "kernels" / name
        directory.mkdir(parents=True)
        spec = {"argv": [program, "60"], "display_name": name, "language": "none"}
        (directory / "kernel.json").write_text(json.dumps(spec))
    return KernelSpecManager(kernel_dirs=[str(tmp_path / "kernels")], ensure_native_kernel=False)


@pytest.fixture
async def kernel(kernelspecs, tmp_path):
    """A kernel's manager with a process."""
    manager = AsyncIOLoopKernelManager(
        kernel_name="sleep", kernel_spec_manager=kernelspecs, connection_file=str(tmp_path / "kernel.json")
    )
    await manager.start_kernel(cwd=str(tmp_path))
    yield manager
    await manager.shutdown_kernel(now=True)


@pytest.fixture
async def server(kernelspecs, tmp_path):
    """A server's kernel manager, which notes what its hooks are called with."""

    class Server(jupyter_compat.HookedKernelManager):
        calls: list[str]

        async def finish_start(self, kernel_id):
            self.calls.append("finish_start")
            await super().finish_start(kernel_id)

        async def await_start(self, kernel_id, kernel, start):
            self.calls.append("await_start")
            await super().await_start(kernel_id, kernel, start)

        def restarter_gave_up(self, kernel_id):
            self.calls.append("restarter_gave_up")
            super().restarter_gave_up(kernel_id)

    manager = Server(
        kernel_spec_manager=kernelspecs,
        connection_dir=str(tmp_path),
        root_dir=str(tmp_path),
        use_pending_kernels=True,
        kernel_manager_class="jupyter_server.services.kernels.kernelmanager.ServerKernelManager",
    )
    manager.calls = []
    yield manager
    await manager.shutdown_all(now=True)


async def started(server):
    """Start a kernel and wait until Jupyter server is done with it: its id."""
    kernel_id = await server.start_kernel(kernel_name="sleep")
    await server.get_kernel(kernel_id).ready
    assert await poll_async(lambda: kernel_id in server._kernel_ports, timeout=10)
    return kernel_id


# -- one kernel's manager -------------------------------------------------------------------------


async def test_set_ready(kernel):
    """The public property returns the future that was set."""
    kernel._ready = asyncio.get_running_loop().create_future()
    assert not kernel.ready.done()
    jupyter_compat.set_ready(kernel)
    assert kernel.ready.done()
    assert kernel.ready.result() is None


async def test_mark_started(kernelspecs):
    """The next start has a future of its own; without the mark it is the old one, which is done."""
    kernel = AsyncIOLoopKernelManager(kernel_name="false", kernel_spec_manager=kernelspecs)
    jupyter_compat.set_ready(kernel)
    jupyter_compat.mark_started(kernel)
    before = kernel.ready
    with pytest.raises(FileNotFoundError):
        await kernel.start_kernel()
    assert kernel.ready is not before
    assert isinstance(kernel.ready.exception(), FileNotFoundError)


async def test_launch_args(kernel, kernelspecs, tmp_path):
    """They are what the kernel was started with, and empty before a start."""
    assert jupyter_compat.launch_args(kernel)["cwd"] == str(tmp_path)
    assert jupyter_compat.launch_args(AsyncIOLoopKernelManager(kernel_spec_manager=kernelspecs)) == {}


async def test_set_launch_args(kernel, tmp_path):
    """A restart starts the kernel with them."""
    (tmp_path / "other").mkdir()
    jupyter_compat.set_launch_args(kernel, {"cwd": str(tmp_path / "other")})
    await kernel.restart_kernel(now=True)
    assert os.readlink(f"/proc/{kernel.provisioner.pid}/cwd") == str(tmp_path / "other")


def test_set_kernel_spec(kernelspecs):
    """The public property returns it, though it is not installed."""
    kernel, spec = AsyncIOLoopKernelManager(kernel_name="gone", kernel_spec_manager=kernelspecs), KernelSpec()
    jupyter_compat.set_kernel_spec(kernel, spec)
    assert kernel.kernel_spec is spec


async def test_close_control_socket(kernel):
    """A started kernel's manager has one; it is closed, and the kernel runs on."""
    socket = kernel._control_socket
    assert not socket.closed
    jupyter_compat.close_control_socket(kernel)
    assert socket.closed
    assert await kernel.is_alive()


async def test_channel_url(kernel):
    """It is what the connection file says."""
    info = kernel.get_connection_info()
    assert jupyter_compat.channel_url(kernel, "iopub") == f"tcp://{info['ip']}:{info['iopub_port']}"


async def test_polling_restarter(kernel):
    """A restarter that runs is polled by a PeriodicCallback; each restart makes another, and a stop removes it."""
    restarter, periodic = _jupyter_compat.polling_restarter(kernel)
    assert isinstance(periodic, PeriodicCallback)
    assert periodic.callback == restarter.poll
    await restarter.poll()
    await kernel.restart_kernel(now=True)
    again, another = _jupyter_compat.polling_restarter(kernel)
    assert again is restarter
    assert another is not periodic
    kernel.stop_restarter()
    assert _jupyter_compat.polling_restarter(kernel) is None


async def test_renew_control_socket(kernel):
    """Each request has a new socket, on which no send waits; to ask for it twice changes nothing."""
    _jupyter_compat.renew_control_socket(kernel)
    _jupyter_compat.renew_control_socket(kernel)
    before = kernel._control_socket
    await kernel.request_shutdown()
    first = kernel._control_socket
    await kernel.request_shutdown()
    assert before.closed
    assert first.closed
    assert not kernel._control_socket.closed
    assert kernel._control_socket.sndtimeo == 0


# -- the kernels of a server ----------------------------------------------------------------------


async def test_add_kernel(server, kernel):
    """It is listed, counts connections, and its ports are known."""
    kernel.execution_state, kernel.last_activity = "idle", server.last_kernel_activity
    jupyter_compat.add_kernel(server, "one", kernel)
    server.notify_connect("one")
    assert "one" in server
    assert server.kernel_model("one")["connections"] == 1
    assert server.ports_changed("one") is False
    server.remove_kernel("one")


async def test_pending_task(server):
    """There is one while the kernel starts and while it is shut down, and none between."""
    kernel_id = await server.start_kernel(kernel_name="sleep")
    assert not jupyter_compat.pending_task(server, kernel_id).done()
    await server.get_kernel(kernel_id).ready
    assert await poll_async(lambda: jupyter_compat.pending_task(server, kernel_id) is None, timeout=10)
    await server.shutdown_kernel(kernel_id, now=True)
    await jupyter_compat.pending_task(server, kernel_id)
    assert kernel_id not in server


async def test_drop_pending_task(server):
    """A start that failed leaves its task, which a shutdown would await; afterwards there is none."""
    kernel_id = await server.start_kernel(kernel_name="false")
    with pytest.raises(FileNotFoundError):
        await server.get_kernel(kernel_id).ready
    assert jupyter_compat.pending_task(server, kernel_id) is not None
    jupyter_compat.drop_pending_task(server, kernel_id)
    assert jupyter_compat.pending_task(server, kernel_id) is None
    server.remove_kernel(kernel_id)


async def test_take_finishing_task(server):
    """Each start has one, once."""
    kernel_id = await started(server)
    assert jupyter_compat.take_finishing_task(server, kernel_id).done()
    assert jupyter_compat.take_finishing_task(server, kernel_id) is None


async def test_finish_start(server):
    """Called with each start; Jupyter server's own watches the kernel."""
    kernel_id = await started(server)
    assert server.calls.count("finish_start") == 1
    assert server._kernel_ports[kernel_id] == server.get_kernel(kernel_id).ports


async def test_await_start(server):
    """Called with each start; what it awaits is the start."""
    await started(server)
    assert server.calls.count("await_start") == 1


async def test_restarter_gave_up(server):
    """Called when the restarter's callbacks for a dead kernel are; Jupyter server's own removes the kernel."""
    kernel_id = await started(server)
    kernel = server.get_kernel(kernel_id)
    restarter, _periodic = _jupyter_compat.polling_restarter(kernel)
    restarter._fire_callbacks("dead")
    assert server.calls.count("restarter_gave_up") == 1
    assert kernel_id not in server
    await kernel.shutdown_kernel(now=True)


# -- kernelspecs, HTTP handlers -------------------------------------------------------------------


def test_spec_directory(kernelspecs, tmp_path):
    """An installed kernelspec's, and None for another."""
    assert jupyter_compat.spec_directory(kernelspecs, "sleep") == str(tmp_path / "kernels" / "sleep")
    assert jupyter_compat.spec_directory(kernelspecs, "no-such") is None


def test_set_http_server():
    """The application uses the server that replaced its own."""
    app, server = ServerApp(), HTTPServer(lambda _request: None)
    jupyter_compat.set_http_server(app, server)
    assert app.http_server is server


def test_untracked_handler():
    """It changes what jupyter_server's own handlers change, and jupyter_server reads it."""
    assert APIHandler._track_activity is True
    assert jupyter_compat.UntrackedHandler._track_activity is False
    assert "_track_activity" in inspect.getsource(APIHandler.update_api_activity)


# -- no others are used ---------------------------------------------------------------------------


def is_private(name: str) -> bool:
    """Whether a name has one leading underscore."""
    return name.startswith("_") and not name.startswith("__") and len(name) > 1


@cache
def jupyter_names() -> set[str]:
    """All private names in the source of jupyter_client and jupyter_server."""
    found = set()
    for package in (jupyter_client, jupyter_server):
        for path in Path(package.__file__).parent.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                name = getattr(node, "attr", None) or getattr(node, "name", None) or getattr(node, "id", None)
                if isinstance(name, str) and is_private(name):
                    found.add(name)
    return found


def defined_in(tree: ast.AST) -> set[str]:
    """The private names that a file's own classes, functions and assignments define."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            on_self = isinstance(node, ast.Name) or (isinstance(node.value, ast.Name) and node.value.id == "self")
            if on_self:
                found.add(node.id if isinstance(node, ast.Name) else node.attr)
    return found


def uses_in(tree: ast.AST) -> set[tuple[int, str]]:
    """The lines and private names that a file takes from objects, modules and ``getattr``."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.add((node.lineno, node.attr))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("jupyter_client", "jupyter_server")):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            found |= {(node.lineno, name) for name in names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            found.add((node.lineno, node.value))
    return {(line, name) for line, name in found if is_private(name)}


# Private names of Python's and tornado's that jupyter_client or jupyter_server use as well.
ALLOWED = {"_exit", "_finished", "_handle_request_exception", "_reason"}


def test_the_search_finds_what_it_is_for():
    """Attributes, names in ``getattr``, modules; not what the file defines itself."""
    tree = ast.parse("from jupyter_server._tz import x\nclass A:\n def f(self): self._own = k._ready, getattr(k, '_q')")
    assert {name for _line, name in uses_in(tree)} == {"_tz", "_own", "_ready", "_q"}
    assert "_own" in defined_in(tree)


@pytest.mark.parametrize("path", sorted({*PACKAGE.rglob("*.py")} - ADAPTERS), ids=lambda path: path.stem)
def test_no_other_file_uses_a_private_member(path):
    """Unless the file defines a member of that name itself; for its classes see the next test."""
    tree = ast.parse(path.read_text())
    private = jupyter_names() - defined_in(tree) - ALLOWED
    assert {f"{path}:{line}: {name}" for line, name in uses_in(tree) if name in private} == set()


def classes():
    """The package's classes that derive from Jupyter's."""
    for module in pkgutil.walk_packages(gateway_slurm.__path__, "gateway_slurm."):
        for kind in vars(importlib.import_module(module.name)).values():
            if inspect.isclass(kind) and kind.__module__ == module.name and any(map(is_jupyter, kind.__mro__)):
                yield kind


def is_jupyter(kind: type) -> bool:
    """Whether a class is jupyter_client's or jupyter_server's."""
    return kind.__module__.startswith(("jupyter_client", "jupyter_server"))


@cache
def members(kind: type) -> set[str]:
    """A Jupyter class's own private methods and attributes."""
    return {name for name in defined_in(ast.parse(textwrap.dedent(inspect.getsource(kind)))) if is_private(name)}


def test_no_class_uses_or_replaces_a_private_member_of_its_base():
    """By ``self``, or by a method of the same name. traitlets finds defaults and validators by their trait's name."""
    wrong = set()
    for kind in classes():
        if Path(inspect.getfile(kind)) in ADAPTERS:
            continue
        theirs = set().union(*(members(base) for base in kind.__mro__ if is_jupyter(base)))
        theirs -= trait_methods(kind)
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
        used = {name for _line, name in uses_in(tree)} | defined_in(tree)
        wrong |= {f"{kind.__name__}.{name}" for name in used & theirs}
    assert wrong == set()


def trait_methods(kind: type) -> set[str]:
    """The names of a class's methods that traitlets calls by their decorators."""
    return {name for name, value in vars(kind).items() if type(value).__module__.startswith("traitlets")}


def test_hooks_are_jupyter_servers_own():
    """Each method that the hooks replace exists there: another name would never be called."""
    for name in ("_finish_kernel_start", "_add_kernel_when_ready", "_handle_kernel_died", "_check_kernel_id"):
        assert callable(getattr(AsyncMappingKernelManager, name)), name
    for name in ("_find_http_port", "_bind_http_server"):
        assert callable(getattr(ServerApp, name)), name
