"""The kernel manager of a server with kernels on Slurm: of the gateway, and of a Jupyter server on a login node.

A start returns at once, and the kernel's model says where it waits in Slurm's queue and why. A kernel whose start
failed is shown as ``dead``, with the reason, until it is deleted. A start can be cancelled at any time, and its job
with it. A Jupyter server uses this manager by one line of its configuration::

    c.ServerApp.kernel_manager_class = "gateway_slurm.SlurmMappingKernelManager"
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter, deque
from collections.abc import Awaitable, Iterator, Mapping
from datetime import datetime, timezone
from functools import partial
from types import MappingProxyType
from typing import Any

from jupyter_server.prometheus.metrics import KERNEL_CURRENTLY_RUNNING_TOTAL
from tornado import web
from tornado.ioloop import IOLoop
from traitlets import Bool, CFloat, CInt, default, observe

from gateway_slurm._jupyter_compat import renew_control_socket
from gateway_slurm._util import TaskSet, call_on, printable
from gateway_slurm.budget import Budget
from gateway_slurm.errors import ConfigError, GatewaySlurmError
from gateway_slurm.events import reason_of
from gateway_slurm.gateway import jupyter_compat
from gateway_slurm.gateway.auth.user import can_see
from gateway_slurm.gateway.channels.frontends import Frontends
from gateway_slurm.gateway.channels.sockets import DEFAULT_MAX_MESSAGE, prepare_context
from gateway_slurm.gateway.channels.state import ExecutionState
from gateway_slurm.gateway.channels.websocket import SlurmWebsocketConnection
from gateway_slurm.gateway.http_errors import PlainHTTPError, as_http
from gateway_slurm.gateway.restore import KernelRestorer, ready_of, server_deployment
from gateway_slurm.gateway.sessions import SlurmSessionManager
from gateway_slurm.gateway.waiting import GIVE_UP, STARTING, given_up_text, waiting_text
from gateway_slurm.provisioner import SlurmProvisioner, settle_cancelled_start
from gateway_slurm.service import SlurmService
from gateway_slurm.turns import Turns

# Seconds that a cancelled start may take to cancel its job; it goes on after that without the request.
CANCEL_SECONDS = 5.0
# Seconds that a start waits for Slurm's answer to the job before it goes on without its caller, and how often it looks.
SUBMIT_SECONDS, SUBMIT_POLL = 3.0, 0.02
# Seconds until a start that still waits is shown under the cells that wait for it, and between two looks for news.
NOTICE_SECONDS, NOTICE_INTERVAL = 3.0, 1.0
# Seconds that a dead kernel is still listed once a frontend shows why, and that its frontends have to take the status.
SHOWN_LINGER, DEAD_SECONDS = 5.0, 1.0
# Dead kernels of one user that are listed.
MAX_DEAD = 20
# Seconds that a restart may take to end before its kernel is shut down.
RESTART_END_SECONDS = 5.0
# Seconds that a Jupyter server's start waits for the kernels of its earlier process.
STARTUP_RESTORE_SECONDS = 20.0


# The answer to a cell that waited while its user restarted the kernel.
DROPPED_CELL = "The kernel was restarted while it waited for its job, and still waits: run this cell again."


def failure_text(error: BaseException) -> str:
    """Why a start failed."""
    return str(error) if isinstance(error, GatewaySlurmError) else f"{type(error).__name__}: {error}"


def slurm_model(kernel: Any) -> dict[str, Any]:
    """``slurm`` of a kernel's model: its job and node, and why it waits. Reads memory only.

    ``reason`` stays Jupyter's own, for a dead kernel: JupyterLab shows it as an error.
    """
    provisioner = getattr(kernel, "provisioner", None)
    if not isinstance(provisioner, SlurmProvisioner):
        return {}
    slurm: dict[str, Any] = {"jobid": provisioner.jobid, "node": provisioner.node, "connect": provisioner.connect}
    if provisioner.directory:
        slurm["directory"] = provisioner.directory
    waiting = None if ready_of(kernel).done() else SlurmService.instance().waiting(kernel.kernel_id)
    if waiting is not None:
        slurm |= {"jobid": waiting.jobid, "state": waiting.state, "reason": waiting.reason}
        slurm |= {"place": waiting.queue_place, "expected_start": waiting.expected_start}
        slurm["waiting"] = waiting_text(waiting)
    return {"slurm": slurm}


def has_started(kernel: Any) -> bool:
    """Whether there is a kernel, dead or alive, that can be restarted and shut down; not after a start that failed."""
    return bool(kernel.has_kernel or getattr(kernel.provisioner, "holds_kernel", False))


def has_job(kernel: Any, owner: str) -> bool:
    """Whether a start has got as far as its job, or needs none: its kernel does not run on Slurm."""
    provisioner = getattr(kernel, "provisioner", None)
    if not isinstance(provisioner, SlurmProvisioner):
        return provisioner is not None
    try:
        return SlurmService.instance().has_job(kernel.kernel_id, owner)
    except ConfigError:  # the start fails with it, too
        return False


async def cancel_start(kernel: Any, starting: asyncio.Task[None]) -> None:
    """Cancel a start, and wait up to ``CANCEL_SECONDS`` until its job is cancelled."""
    starting.cancel()
    await asyncio.wait({starting}, timeout=CANCEL_SECONDS)
    if not ready_of(kernel).done() and isinstance(kernel.provisioner, SlurmProvisioner):
        await kernel.provisioner.cleanup()  # jupyter_client had the kernel, and had not said so yet


async def end_restart(kernel: Any, restarting: asyncio.Task[Any] | None) -> None:
    """Bring a restart to its end: cancel ``restarting``, or wait for the restarter's, which cannot be cancelled.

    jupyter_client's shutdown ends a kernel that is ``ready``, only forgets one that failed, and raises for one that is
    pending, which a cancelled restart stays without a limit. A kernel that exists is ready afterwards.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + RESTART_END_SECONDS
    if restarting is not None:
        restarting.cancel()
        await asyncio.wait({restarting}, timeout=RESTART_END_SECONDS)
    else:
        # Each half of a restart has its own future.
        while not (ready := ready_of(kernel)).done() and loop.time() < deadline:
            await asyncio.wait({ready}, timeout=deadline - loop.time())
    ready = ready_of(kernel)
    if not ready.done() or (has_started(kernel) and (ready.cancelled() or ready.exception() is not None)):
        jupyter_compat.set_ready(kernel)


# Its handlers are those of a Jupyter server; the gateway has its own.
EXECUTIONS_API = "gateway_slurm.gateway.executions_api"


def set_up_server(manager: SlurmMappingKernelManager, app: Any) -> None:
    """Set the classes that belong to this manager, where the server's configuration names no others.

    Called while the server is set up.
    """
    configured = app.config.get(type(app).__name__, {})
    jupyter_compat.correct_log(manager.log, lambda: not manager.kill_kernels_on_exit)
    if "kernel_websocket_connection_class" not in configured:
        app.kernel_websocket_connection_class = SlurmWebsocketConnection
    elif hasattr(app, "kernel_websocket_connection_class"):
        manager.has_frontends = issubclass(app.kernel_websocket_connection_class, SlurmWebsocketConnection)
    if getattr(app, "restores_kernels", False):
        return  # the gateway, which does the rest itself
    if "session_manager_class" not in configured:
        app.session_manager_class = SlurmSessionManager
    if EXECUTIONS_API not in getattr(app, "extra_services", [EXECUTIONS_API]):
        app.extra_services = [*app.extra_services, EXECUTIONS_API]
    if hasattr(app, "port"):
        SlurmService.instance(manager.log).leave_at_exit = not manager.kill_kernels_on_exit
        # The loop runs this first, before it accepts requests: otherwise a client would see no kernels.
        IOLoop.current().add_callback(restore_before_listening, manager, app)


def restore_before_listening(manager: SlurmMappingKernelManager, app: Any) -> None:
    """Restore the kernels of this server's earlier process. The server starts also if the store cannot be used."""
    manager.restorer.restore_now(server_deployment(app.port), STARTUP_RESTORE_SECONDS)
    if manager.restorer.failure is not None and manager.restorer.done.is_set():
        manager.log.error("earlier kernels are not restored, and none can be started: %s", manager.restorer.failure)


class SlurmMappingKernelManager(jupyter_compat.HookedKernelManager):
    """Kernels by id, each with an owner; "" owns those of a server with one user."""

    max_kernels = CInt(0, config=True, help="Maximum number of kernels, starting ones included. 0: no limit.")
    max_kernels_per_user = CInt(
        0, config=True, help="Maximum number of one user's kernels, starting ones included. 0: no limit."
    )
    max_starts_per_minute = CInt(
        100,
        min=0,
        config=True,
        help="""Maximum number of kernels of one user that are started or restarted in a minute, also those whose start
        fails. It is not applied where the server has one user. 0: no limit.""",
    )
    max_websockets_per_user = CInt(
        100,
        config=True,
        min=0,
        help="""Maximum number of open websockets to one user's kernels: a page has one for each kernel that it shows.
        One more is refused with status 429. It is not applied where the server has one user. 0: no limit.""",
    )
    dead_kernel_linger = CFloat(
        600.0,
        config=True,
        help="""Seconds that a kernel that died, or did not start, is still listed, with the reason. Once a frontend
        has shown the reason, and no other lacks output, it is listed for some seconds only.""",
    )
    kill_kernels_on_exit = Bool(
        False,
        config=True,
        help="""Whether kernels on Slurm end with the server. Default: they run on, and the next server restores
        them; without a next server they end after SlurmService.orphan_timeout.""",
    )
    max_request_size = CInt(
        128 << 20,
        config=True,
        min=1 << 20,
        help="""Maximum size in bytes of one message that a frontend sends, such as a cell with its text. The server
        needs several times the memory for it. A larger message is read and thrown away, and its cell fails with the
        reason; the frontend stays connected.""",
    )
    max_message_size = CInt(
        DEFAULT_MAX_MESSAGE,
        min=0,
        config=True,
        help="""Maximum size in bytes of one part of a message that comes by ZMQ: its JSON text, or one of its buffers.
        These are replies, and all output of kernels that are direct or not on Slurm. The server needs the memory for
        it. A larger message ends the kernel's connection. The server makes it again, and says so under the cell. Other
        output comes from the kernel's journal (SlurmService.kept_output). 0: no limit.""",
    )

    memory_per_user = CInt(
        256 << 20,
        min=0,
        config=True,
        help="""Bytes that the server holds for one user at most: messages that wait for a kernel or for a page, the
        last output of kernels, uploads. Over it the largest of these is dropped or refused, with a reason under the
        cell, or the page connects again; output stays on the kernel's node. It is not applied where the server has one
        user. 0: no limit.""",
    )
    memory_limit = CInt(
        1 << 30,
        min=0,
        config=True,
        help="""Bytes that the server holds for all users together at most. Over it the user who has most pays, as over
        memory_per_user; 4 MiB are left to each. The process needs about 200 MiB beside it. 0: no limit.""",
    )
    show_waiting = Bool(
        True,
        config=True,
        help="""Whether a frontend shows, under the first cell that waits for its kernel, the job, its place in Slurm's
        queue and its expected start. The text is taken away before the cell runs; a notebook that is saved meanwhile
        has it.""",
    )

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Owner and maker of each kernel: a service that starts kernels for others goes on to manage them.
        self._owners: dict[str, tuple[str, str]] = {}
        # When each user's kernels were started, in the last minute, by the loop's clock.
        self._started: dict[str, deque[float]] = {}
        # Whether the websockets are of our class, which shows kept output and warnings.
        self.has_frontends = True
        self.budget = Budget(self.memory_per_user, self.memory_limit)
        self.turns = Turns()
        self.frontends = Frontends(self, self._why_dead, self._remove_soon)
        self.restorer = KernelRestorer(self)
        self._states: dict[str, ExecutionState] = {}
        self._lingering: dict[str, asyncio.TimerHandle] = {}
        self._tasks = TaskSet()
        self._ending: dict[str, asyncio.Task[None]] = {}
        self._restarting: dict[str, asyncio.Task[Any]] = {}
        # Why a start was given up.
        self._given_up: dict[str, str] = {}
        prepare_context(self.context, self.max_message_size)
        if self.parent is not None:
            set_up_server(self, self.parent)

    @default("use_pending_kernels")
    def _default_use_pending_kernels(self) -> bool:
        return True

    @default("untracked_message_types")
    def _default_untracked_message_types(self) -> list[str]:
        # Control requests that jupyter_server's list lacks; JupyterLab sends them beside running cells.
        verbs, kinds = ("create", "delete", "list"), ("request", "reply")
        subshells = [f"{verb}_subshell_{kind}" for verb in verbs for kind in kinds]
        theirs: Any = jupyter_compat.HookedKernelManager.class_traits()["untracked_message_types"]
        return [*theirs.make_dynamic_default(), *subshells]

    @observe("context")
    def _context_was_set(self, change: Any) -> None:
        prepare_context(change["new"], self.max_message_size)

    def pre_start_kernel(self, kernel_name: str | None, kwargs: dict[str, Any]) -> Any:
        """Make a kernel's manager: no send on its sockets may block this loop."""
        kernel, name, kernel_id = super().pre_start_kernel(kernel_name, kwargs)
        if kernel.context is not self.context:  # with ``shared_context`` off
            prepare_context(kernel.context, self.max_message_size)
        renew_control_socket(kernel)
        return kernel, name, kernel_id

    def find_kernel(self, kernel_id: str) -> Any:
        """The kernel's own manager; None for an id that is not known."""
        return self.get_kernel(kernel_id) if kernel_id in self else None

    def state_of(self, kernel_id: str) -> ExecutionState:
        """What decides the kernel's execution state; it begins as the kernel's is, or with "starting"."""
        if kernel_id not in self._states:
            kernel = self.get_kernel(kernel_id)
            begin = getattr(kernel, "execution_state", "starting")
            self._states[kernel_id] = ExecutionState(kernel, self.track_message_type, begin)
        return self._states[kernel_id]

    # -- owners -----------------------------------------------------------------------------------

    def check_kernel_id(self, kernel_id: str) -> None:
        """Raise HTTPError 404 for a kernel that does not exist, and 503 where it may be restored yet."""
        if kernel_id not in self and (reason := self.restorer.waits_because):
            raise web.HTTPError(503, reason)
        super().check_kernel_id(kernel_id)

    def is_visible(self, kernel_id: str, user: Any) -> bool:
        """Whether the kernel exists and ``user`` may see it: its owner, the service that started it, or an admin."""
        if user is None or kernel_id not in self:
            return False
        return can_see(user, self.owner_of(kernel_id), self.maker_of(kernel_id))

    def models_for(self, user: Any) -> list[dict[str, Any]]:
        """The models of the kernels that ``user`` may see."""
        return [self.kernel_model(name) for name in self.list_kernel_ids() if self.is_visible(name, user)]

    def owner_of(self, kernel_id: str) -> str:
        return self._owners.get(kernel_id, ("", ""))[0]

    def maker_of(self, kernel_id: str) -> str:
        return self._owners.get(kernel_id, ("", ""))[1]

    def check_limits(self, owner: str, at_peers: Mapping[str, str] = MappingProxyType({})) -> None:
        """Raise HTTPError 429 if ``owner`` may not start one more kernel.

        ``at_peers`` are the kernels of the deployment's other gateways, each with its owner.
        """
        others = {kernel_id: user for kernel_id, user in at_peers.items() if kernel_id not in self}
        living = [kernel_id for kernel_id in self.list_kernel_ids() if not self._is_dead(kernel_id)]
        of_owner = [*map(self.owner_of, living), *others.values()].count(owner)
        for limit, count, name in (
            (self.max_kernels, len(living) + len(others), "max_kernels"),
            (self.max_kernels_per_user, of_owner, "max_kernels_per_user"),
        ):
            if 0 < limit <= count:
                yours = "of yours " if name == "max_kernels_per_user" else ""
                raise web.HTTPError(
                    429,
                    f"{count} kernels {yours}run or wait already, and {limit} is the limit "
                    f"({type(self).__name__}.{name}): shut one down first",
                )

    def count_start(self, owner: str) -> None:
        """Count one more start or restart. Raises HTTPError 429 for too many in a minute."""
        if not owner or not self.max_starts_per_minute:
            return
        now = asyncio.get_running_loop().time()
        for user in [user for user, times in self._started.items() if times[-1] < now - 60.0]:
            del self._started[user]
        times = self._started.setdefault(owner, deque())
        while times and times[0] < now - 60.0:
            times.popleft()
        if len(times) >= self.max_starts_per_minute:
            raise web.HTTPError(
                429,
                f"{len(times)} kernels were started for you in the last minute, and that is the limit "
                f"({type(self).__name__}.max_starts_per_minute): try again in {times[0] + 60.0 - now:.0f} s",
            )
        times.append(now)

    # -- start --------------------------------------------------------------------------------------

    async def start_kernel(  # type: ignore[override] # as AsyncMultiKernelManager's
        self,
        *,
        kernel_id: str | None = None,
        owner: str = "",
        maker: str = "",
        fields: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> str:
        """Begin a start, and return the kernel's id once Slurm has accepted a job, after ``SUBMIT_SECONDS`` at most.

        ``owner`` is the name of the user who will own the kernel, ``maker`` that of the user or service that asked.
        ``fields`` are request fields that have been checked.

        Raises HTTPError 429 over a limit, 409 for an id that is taken, and for a start that failed by then the status
        of its error; no kernel is left.
        """
        self.check_limits(owner)
        kernel_id = kernel_id or self.new_kernel_id(**kwargs)
        if kernel_id in self:
            raise web.HTTPError(409, f"kernel {kernel_id} exists already")
        self.count_start(owner)
        if fields:  # a kernel on Slurm: others have none
            kwargs |= {"slurm_owner": owner, "slurm_maker": maker, "slurm_fields": fields}
        self._owners[kernel_id] = owner, maker
        try:
            await super().start_kernel(kernel_id=kernel_id, **kwargs)
        except BaseException:
            self._forget(kernel_id)
            raise
        kernel: Any = self.get_kernel(kernel_id)
        try:
            error = await self._early_error(kernel, owner)
        except asyncio.CancelledError:
            self._tasks.create_task(self.shutdown_kernel(kernel_id, now=True))
            raise
        if error is not None:
            if self.find_kernel(kernel_id) is kernel:
                await self.shutdown_kernel(kernel_id, now=True)
            raise as_http(error) from error
        if self.show_waiting and self.has_frontends:
            self._tasks.create_task(self._show_waiting(kernel_id, kernel))
        return kernel_id

    async def _early_error(self, kernel: Any, owner: str) -> BaseException | None:
        """The error of a start that fails before it has a job, within ``SUBMIT_SECONDS``."""
        loop, ready = asyncio.get_running_loop(), ready_of(kernel)
        deadline = loop.time() + SUBMIT_SECONDS
        while not ready.done() and not has_job(kernel, owner) and loop.time() < deadline:
            await asyncio.wait({ready}, timeout=SUBMIT_POLL)
        return ready.exception() if ready.done() and not ready.cancelled() else None

    async def _show_waiting(self, kernel_id: str, kernel: Any) -> None:
        """Show the frontends why the kernel is not there yet, until it is, or never will be."""
        ready, delay = ready_of(kernel), NOTICE_SECONDS
        while not (await asyncio.wait({ready}, timeout=delay))[0] and self.find_kernel(kernel_id) is kernel:
            delay = NOTICE_INTERVAL
            if isinstance(kernel.provisioner, SlurmProvisioner):
                waiting = SlurmService.instance().waiting(kernel_id, self.owner_of(kernel_id))
                text = STARTING if waiting is None else waiting_text(waiting)
                if connection := self.frontends.find(kernel_id):
                    connection.show_waiting(f"{text} {GIVE_UP}")

    async def finish_start(self, kernel_id: str) -> None:
        reason = await self._wait_ready(kernel_id)
        if reason and kernel_id in self:
            self._set_dead(kernel_id, reason)
        elif not reason:
            await super().finish_start(kernel_id)
            kernel: Any = self.get_kernel(kernel_id)
            self.state_of(kernel_id).listens()
            self.restorer.remember(kernel_id)
            self._follow(kernel_id, kernel)
            if self.has_frontends and (note := getattr(kernel.provisioner, "start_note", "")):
                self.frontends.warn(kernel_id, f"{note}\n")

    async def await_start(self, kernel_id: str, kernel: Any, start: Awaitable[None]) -> None:
        try:
            await start
        except Exception as error:  # noqa: BLE001 - ``ready`` carries it to the callers
            self.log.debug("kernel %s did not start: %s", kernel_id, printable(error))
        finally:
            jupyter_compat.drop_pending_task(self, kernel_id)

    async def _wait_ready(self, kernel_id: str) -> str:
        """Wait for the end of a start; return why it failed, "" where it did not."""
        kernel = self.find_kernel(kernel_id)
        if kernel is None:
            return "the kernel was shut down"
        ready = ready_of(kernel)
        await asyncio.wait({ready})
        return self._start_failure(kernel_id, ready)

    def _start_failure(self, kernel_id: str, ready: asyncio.Future[None]) -> str:
        if ready.cancelled():
            return "its start was cancelled"
        error = ready.exception()
        if error is not None and kernel_id in self._given_up:
            return self._given_up[kernel_id]
        return failure_text(error) if error is not None else ""

    def adopt_kernel(self, kernel_id: str, kernel: Any, owner: str, maker: str) -> None:
        """Take a running kernel of an earlier server into the tables, as after a start."""
        self._owners[kernel_id] = owner, maker
        jupyter_compat.add_kernel(self, kernel_id, kernel)
        self.frontends.connection(kernel_id, is_restored=True)
        self.start_watching_activity(kernel_id)
        self.add_restart_callback(kernel_id, lambda: self.restarter_gave_up(kernel_id), "dead")
        self._follow(kernel_id, kernel)
        KERNEL_CURRENTLY_RUNNING_TOTAL.labels(type=kernel.kernel_name).inc()
        self.initialize_culler()

    def _follow(self, kernel_id: str, kernel: Any) -> None:
        """Follow the restarts and the end of a kernel that runs; once for each kernel."""
        self.add_restart_callback(kernel_id, partial(self._follow_restart, kernel_id))
        self._tasks.create_task(self._watch_end(kernel_id, kernel))

    async def _watch_end(self, kernel_id: str, kernel: Any) -> None:
        """Show the kernel as dead once it cannot be restarted in its place, with the reason and what to do."""
        if not isinstance(kernel.provisioner, SlurmProvisioner):
            return
        kernel.provisioner.on_started = partial(self._after_restart, kernel_id)
        loop = asyncio.get_running_loop()
        kernel.provisioner.on_death = partial(call_on, loop, self._after_death, kernel_id, kernel)
        self._after_death(kernel_id, kernel)  # it may have died since its start
        if self.has_frontends:
            kernel.provisioner.show_warnings(partial(call_on, loop, self.frontends.warn, kernel_id))
        reason = await kernel.provisioner.until_over()
        if self.find_kernel(kernel_id) is kernel and not kernel.shutting_down:
            kernel.stop_restarter()
            if self._is_dead(kernel_id):
                kernel.reason = reason
                self._tell(kernel_id, reason)
            self._set_dead(kernel_id, reason)

    def _after_death(self, kernel_id: str, kernel: Any) -> None:
        """Show a kernel that has no restarter as dead. Until its place is released, a user may restart it."""
        if self.find_kernel(kernel_id) is not kernel or kernel.autorestart or kernel.shutting_down:
            return
        provisioner = kernel.provisioner
        if provisioner.is_dead and provisioner.can_restart and kernel_id not in self._restarting:
            seconds = SlurmService.instance().release_grace
            kept = f"its place in job {provisioner.jobid} is kept for {seconds:g} s, in which it can be restarted"
            self._set_dead(kernel_id, f"{provisioner.exit_reason}; {kept}")

    def _follow_restart(self, kernel_id: str) -> None:
        """The restarter begins to restart the kernel."""
        if kernel_id in self:
            self.state_of(kernel_id).restarts()
            self.frontends.follow_restart(kernel_id)

    def _after_restart(self, kernel_id: str, moved: bool) -> None:
        """A kernel on Slurm was restarted, by a user or the restarter; ``moved``: it has another address."""
        if kernel_id in self:
            self.state_of(kernel_id).listens()
            if moved:
                self.frontends.reconnect(kernel_id)

    def update_env(self, *, kernel_id: str, env: dict[str, str]) -> None:
        """Set the environment of the kernel's next process; jupyter_server calls it when a document is renamed."""
        super().update_env(kernel_id=kernel_id, env=env)
        if kernel_id in self and ready_of(self.get_kernel(kernel_id)).done():
            self.restorer.remember(kernel_id)

    # -- the end ------------------------------------------------------------------------------------

    def _is_dead(self, kernel_id: str) -> bool:
        return kernel_id in self._states and self._states[kernel_id].is_dead

    def _set_dead(self, kernel_id: str, reason: str) -> None:
        """Show the kernel as dead, with the reason, for ``dead_kernel_linger`` seconds."""
        kernel = self.find_kernel(kernel_id)
        if kernel is None or kernel_id in self._lingering:
            return
        self.stop_watching_activity(kernel_id)
        self.state_of(kernel_id).dies()
        kernel.reason = reason
        # The reason may quote what the kernel printed: that is not an admin's to read. Events say the rest.
        level = logging.DEBUG if self.owner_of(kernel_id) else logging.WARNING
        self.log.log(level, "kernel %s is dead: %s", kernel_id, printable(reason))
        self._remove_later(kernel_id, self.dead_kernel_linger)
        self._remove_oldest_dead(self.owner_of(kernel_id))
        self._tell(kernel_id, reason)
        self._remove_soon(kernel_id)

    def _remove_oldest_dead(self, owner: str) -> None:
        """List at most MAX_DEAD dead kernels of a user: those that died last."""
        dead = [kernel_id for kernel_id in self._lingering if self.owner_of(kernel_id) == owner]
        for kernel_id in dead[:-MAX_DEAD] if owner else ():
            self._lingering[kernel_id].cancel()
            self._remove_later(kernel_id, 0.0)

    def _tell(self, kernel_id: str, reason: str) -> None:
        """Answer the frontends' cells with the reason of the kernel's death."""
        if connection := self.frontends.find(kernel_id):
            connection.fail(reason)

    def _remove_soon(self, kernel_id: str) -> None:
        """Once a frontend shows why the kernel is dead, and all have their output, list it only while it may restart.

        JupyterLab runs no cell with a dead kernel. Once the kernel is not listed any more, a restart makes a new one.
        """
        sessions = self.frontends.sessions(kernel_id)
        if not any(session.failure_shown for session in sessions):
            return
        if any(session.has_unsent for session in sessions):  # it would be lost; each frontend reports when it has it
            return
        timer = self._lingering.get(kernel_id)
        provisioner = getattr(self.find_kernel(kernel_id), "provisioner", None)
        can_restart = isinstance(provisioner, SlurmProvisioner) and provisioner.can_restart
        seconds = SlurmService.instance().release_grace if can_restart else SHOWN_LINGER
        if timer is not None and timer.when() > asyncio.get_running_loop().time() + seconds:
            timer.cancel()
            self._remove_later(kernel_id, seconds)

    def _remove_later(self, kernel_id: str, seconds: float) -> None:
        self._lingering[kernel_id] = asyncio.get_running_loop().call_later(
            seconds, lambda: self._tasks.create_task(self._remove_dead(kernel_id))
        )

    async def _remove_dead(self, kernel_id: str) -> None:
        if self._is_dead(kernel_id) and (connection := self.frontends.find(kernel_id)):
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(connection.send_dead(), DEAD_SECONDS)
        if self._is_dead(kernel_id):  # still: a user may have restarted it meanwhile
            await self.shutdown_kernel(kernel_id, now=True)

    def restarter_gave_up(self, kernel_id: str) -> None:
        kernel = self.find_kernel(kernel_id)
        if kernel is None:
            return
        provisioner = kernel.provisioner
        if isinstance(provisioner, SlurmProvisioner) and provisioner.is_dead and not provisioner.can_restart:
            return  # its job ends: ``_watch_end`` shows that, with Slurm's word
        reason = getattr(provisioner, "exit_reason", "")
        self._set_dead(kernel_id, reason or "it died, and was not restarted")

    async def shutdown_all(self, now: bool = False) -> None:  # type: ignore[override] # as AsyncMultiKernelManager's
        """End all kernels, starts and tasks; kernels on Slurm run on unless ``kill_kernels_on_exit`` is set.

        In that case the service is closed as well, which would otherwise end them.
        """
        if not self.kill_kernels_on_exit:
            await self.restorer.hand_over_kernels()
        await self.shutdown_each(self.list_kernel_ids(), now)
        await self._tasks.close()  # before the service, whose loop some of them wait for
        self.turns.close()
        if not self.kill_kernels_on_exit:
            await self.restorer.close_service()

    async def shutdown_each(self, kernel_ids: list[str], now: bool = False) -> None:
        """Shut these kernels down. An error is logged, and the others are shut down all the same."""
        ends = [self.shutdown_kernel(kernel_id, now=now) for kernel_id in kernel_ids]
        for kernel_id, error in zip(kernel_ids, await asyncio.gather(*ends, return_exceptions=True), strict=True):
            if isinstance(error, BaseException):
                self.log.error("kernel %s was not shut down in good order", kernel_id, exc_info=error)

    async def shutdown_kernel(  # type: ignore[override] # as AsyncMultiKernelManager's
        self, kernel_id: str, now: bool | None = False, restart: bool | None = False
    ) -> None:
        """End a kernel, or cancel its start; return when it has ended and its job is cancelled, or kept on purpose."""
        self.get_kernel(kernel_id)  # raises HTTPError 404
        if kernel_id not in self._ending:
            ending = self._ending[kernel_id] = asyncio.ensure_future(self._end(kernel_id, bool(now)))
            ending.add_done_callback(lambda _ending: self._ending.pop(kernel_id, None))
        # A caller that is cancelled does not stop the shutdown.
        await asyncio.shield(self._ending[kernel_id])

    async def _end(self, kernel_id: str, now: bool) -> None:
        kernel: Any = self.get_kernel(kernel_id)
        starting = jupyter_compat.pending_task(self, kernel_id)
        if starting is not None and not ready_of(kernel).done():
            KERNEL_CURRENTLY_RUNNING_TOTAL.labels(type=kernel.kernel_name).dec()
            await cancel_start(kernel, starting)
            jupyter_compat.drop_pending_task(self, kernel_id)
            self.remove_kernel(kernel_id)
            return
        await end_restart(kernel, self._restarting.get(kernel_id))
        await super().shutdown_kernel(kernel_id, now=now)
        stopping = jupyter_compat.pending_task(self, kernel_id)
        if stopping is not None:
            await asyncio.wait({stopping})
        if isinstance(kernel.provisioner, SlurmProvisioner):
            # Also where the manager's own shutdown failed: the job must end, and the kernel must not be listed.
            await kernel.provisioner.cleanup()
            jupyter_compat.drop_pending_task(self, kernel_id)
            self.remove_kernel(kernel_id)
        self._forget(kernel_id)

    def remove_kernel(self, kernel_id: str) -> Any:
        kernel: Any = super().remove_kernel(kernel_id)
        if kernel is not None:
            # Its manager must not start the kernel again, nor keep a socket, with which the process would not end.
            kernel.stop_restarter()
            jupyter_compat.close_control_socket(kernel)
        self._forget(kernel_id)
        return kernel

    def _forget(self, kernel_id: str) -> None:
        if kernel_id in self:
            return
        self._owners.pop(kernel_id, None)
        self._given_up.pop(kernel_id, None)
        self._states.pop(kernel_id, None)
        finishing = jupyter_compat.take_finishing_task(self, kernel_id)
        if finishing is not None and finishing is not asyncio.current_task():
            finishing.cancel()
        if timer := self._lingering.pop(kernel_id, None):
            timer.cancel()
        self.frontends.close(kernel_id, "the kernel was shut down")

    # -- restart, interrupt ---------------------------------------------------------------------------

    async def restart_kernel(self, kernel_id: str, now: bool = False) -> Any:  # type: ignore[override] # as above
        """Restart in the same allocation. Raises HTTPError 409, with the reason, where that is not possible.

        A kernel that waits for Slurm goes on waiting, and only its cells are dropped: it will be a new one anyway.
        """
        if self._starting(kernel_id) is not None:
            if connection := self.frontends.find(kernel_id):
                connection.restart_waiting(DROPPED_CELL)
            return None
        self._ready_kernel(kernel_id, "restarted")
        connection = self.frontends.connection(kernel_id)
        connection.hold("the kernel was restarted before this was done: run the cell again")
        if lingering := self._lingering.pop(kernel_id, None):
            lingering.cancel()
        self.state_of(kernel_id).restarts()
        restarting = asyncio.ensure_future(super().restart_kernel(kernel_id, now=now))
        self._restarting[kernel_id] = restarting
        try:
            result = await asyncio.shield(restarting)
        except Exception as error:
            self._set_dead(kernel_id, failure_text(error))
            status = 409 if isinstance(error, GatewaySlurmError) else 500
            message = "the kernel was not restarted: {}"
            brief = message.format(reason_of(error))
            raise PlainHTTPError(status, message.format(failure_text(error)), brief=brief) from error
        except asyncio.CancelledError:
            if restarting.cancelled():
                raise web.HTTPError(409, "the kernel was shut down while it was restarted") from None
            raise
        finally:
            if self._restarting.get(kernel_id) is restarting:
                del self._restarting[kernel_id]
        if lingering:
            self.start_watching_activity(kernel_id)
        self.state_of(kernel_id).listens()
        await connection.resume()
        return result

    def _ready_kernel(self, kernel_id: str, verb: str) -> Any:
        """The kernel's own manager. Raises HTTPError 409 where its start is under way or has failed, with the reason.

        jupyter_client would submit another job for it, and jupyter_server would fail when the kernel runs.
        """
        kernel: Any = self.get_kernel(kernel_id)
        ready = ready_of(kernel)
        if not ready.done():
            raise web.HTTPError(409, f"the kernel is still starting and cannot be {verb}; it can be shut down")
        if (reason := self._start_failure(kernel_id, ready)) and not has_started(kernel):
            brief = f"the kernel did not start and cannot be {verb}: start a new kernel"
            raise PlainHTTPError(409, f"{brief}. {reason}", brief=brief)
        return kernel

    def _starting(self, kernel_id: str) -> asyncio.Task[None] | None:
        """The task of a start on Slurm that is under way. Raises HTTPError 404."""
        kernel: Any = self.get_kernel(kernel_id)
        is_pending = not ready_of(kernel).done() and isinstance(kernel.provisioner, SlurmProvisioner)
        return jupyter_compat.pending_task(self, kernel_id) if is_pending else None

    async def interrupt_kernel(self, kernel_id: str) -> None:  # type: ignore[override]
        """Interrupt the kernel, or give its start up: the kernel is dead then, and its job is cancelled.

        Raises HTTPError 409 while it is restarted.
        """
        if (starting := self._starting(kernel_id)) is not None and await self._give_up(kernel_id, starting):
            return
        await self._ready_kernel(kernel_id, "interrupted").interrupt_kernel()

    async def _give_up(self, kernel_id: str, starting: asyncio.Task[None]) -> bool:
        """Cancel a start; False if the kernel runs already. It goes on after ``CANCEL_SECONDS`` without the caller."""
        kernel = self.get_kernel(kernel_id)
        waiting = SlurmService.instance().waiting(kernel_id, self.owner_of(kernel_id))
        self._given_up[kernel_id] = given_up_text(waiting)
        await cancel_start(kernel, starting)
        ready = ready_of(kernel)
        if not ready.done():
            settle_cancelled_start(kernel)
        if ready.cancelled() or ready.exception() is not None:
            return True
        del self._given_up[kernel_id]
        return False

    # -- models ---------------------------------------------------------------------------------------

    def kernel_model(self, kernel_id: str) -> dict[str, Any]:
        """Jupyter's model, with ``slurm``: the job, its state, the kernel's place, and the wait in a sentence."""
        model: dict[str, Any] = super().kernel_model(kernel_id)
        model.update(slurm_model(self.get_kernel(kernel_id)))
        return model

    def counts(self) -> Iterator[tuple[str, int]]:
        """The number of kernels in each execution state."""
        yield from Counter(str(self.find_kernel(name).execution_state) for name in self.list_kernel_ids()).items()

    def owners(self) -> list[str]:
        """The owner of each kernel that is not dead."""
        return [self.owner_of(name) for name in self.list_kernel_ids() if not self._is_dead(name)]

    async def _why_dead(self, kernel_id: str) -> str:
        reason = await self._wait_ready(kernel_id)
        return reason or (str(self.find_kernel(kernel_id).reason) if self._is_dead(kernel_id) else "")

    # -- activity, idle kernels -----------------------------------------------------------------------------

    def start_watching_activity(self, kernel_id: str) -> None:
        """Keep ``execution_state`` and ``last_activity`` from what the kernel publishes."""
        kernel: Any = self.get_kernel(kernel_id)
        kernel.reason, kernel.last_activity = "", datetime.now(timezone.utc)
        self.frontends.connection(kernel_id)

    async def cull_kernel_if_idle(self, kernel_id: str) -> None:
        """Shut down a kernel that idles. A start in the queue is not idle; a dead kernel is shown for a while."""
        kernel = self.find_kernel(kernel_id)
        if kernel is not None and ready_of(kernel).done() and not self._is_dead(kernel_id):
            facts = {"user": self.owner_of(kernel_id), "kernel_id": kernel_id, "kernelspec": kernel.kernel_name}
            await super().cull_kernel_if_idle(kernel_id)
            if kernel_id not in self:
                idle = f"idle since {kernel.last_activity:%Y-%m-%d %H:%M:%S}"
                SlurmService.instance().events.emit("kernel_culled", **facts, reason=idle)
