"""The kernel manager of a server whose kernels wait in Slurm's queue: the gateway's, and a Jupyter server's.

A start answers at once; the kernel's model says where it waits, and why. One that fails shows ``dead``
with its reason until it is deleted. A start can be given up at any time, and its job goes with it. For a
Jupyter server on a login node it is one line of its configuration::

    c.ServerApp.kernel_manager_class = "gateway_slurm.gateway.kernel_manager.SlurmMappingKernelManager"
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from tornado.ioloop import IOLoop

from gateway_slurm.allocations.model import Waiting
from gateway_slurm.errors import GatewaySlurmError
from gateway_slurm.gateway.channels.websocket import SlurmWebsocketConnection
from gateway_slurm.gateway.restore import server_deployment
from gateway_slurm.gateway.sessions import SlurmSessionManager
from gateway_slurm.provisioner import SlurmProvisioner
from gateway_slurm.service import SlurmService

if TYPE_CHECKING:
    pass
from collections import Counter
from collections.abc import Coroutine, Iterator, Mapping
from types import MappingProxyType

from jupyter_server.prometheus.metrics import KERNEL_CURRENTLY_RUNNING_TOTAL
from jupyter_server.services.kernels.kernelmanager import AsyncMappingKernelManager
from tornado import web
from traitlets import Bool, CFloat, CInt, default

from gateway_slurm._util import printable
from gateway_slurm.gateway.auth.user import sees
from gateway_slurm.gateway.channels.channels import KernelChannels
from gateway_slurm.gateway.channels.frontends import Frontends
from gateway_slurm.gateway.channels.sockets import Activity, with_room
from gateway_slurm.gateway.restore import KernelRestorer


def ready_of(kernel: Any) -> asyncio.Future[None]:
    """The kernel manager's ``ready``, on this loop."""
    ready = kernel.ready
    return ready if isinstance(ready, asyncio.Future) else asyncio.wrap_future(ready)


def words_of(error: BaseException) -> str:
    """Why a start failed."""
    return str(error) if isinstance(error, GatewaySlurmError) else f"{type(error).__name__}: {error}"


def slurm_model(kernel: Any) -> dict[str, Any]:
    """What a kernel's model has beside Jupyter's: ``slurm``, and ``reason`` while it waits. Reads memory only."""
    provisioner = getattr(kernel, "provisioner", None)
    if not isinstance(provisioner, SlurmProvisioner):
        return {}
    slurm: dict[str, Any] = {
        "jobid": provisioner.jobid,
        "node": provisioner.node,
        "connect": provisioner.connect,
    }
    waiting = None if ready_of(kernel).done() else SlurmService.instance().waiting(kernel.kernel_id)
    if waiting is None:
        return {"slurm": slurm}
    slurm |= {
        "jobid": waiting.jobid,
        "state": waiting.state,
        "reason": waiting.reason,
        "place": waiting.place,
        "expected_start": waiting.expected_start,
    }
    return {"slurm": slurm, "reason": _why(waiting)}


def _why(waiting: Waiting) -> str:
    words = f"job {waiting.jobid} is {waiting.state}"
    if waiting.reason and waiting.reason != "None":
        words += f" ({waiting.reason})"
    if waiting.place:
        words += f", number {waiting.place} in its partition's queue"
    if waiting.expected_start:
        words += ", expected to start at " + time.strftime("%Y-%m-%d %H:%M", time.localtime(waiting.expected_start))
    return words


# -- What is done around a kernel's end, so that jupyter_client does all of its work, and leaves nothing. --


# Seconds that a restart is given to come to an end.
END_SECONDS = 5.0


async def end_restart(kernel: Any, restarting: asyncio.Task[Any] | None) -> None:
    """Come to the end of a restart: of this task, which is cancelled, or of the restarter's, which cannot be.

    jupyter_client shuts down what is ``ready``, forgets without a word what failed, and raises for what is
    neither, as a restart is for ever that was cancelled. A kernel that is there is ready afterwards.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + END_SECONDS
    if restarting is not None:
        restarting.cancel()
        await asyncio.wait({restarting}, timeout=END_SECONDS)
    else:
        # It is another future for each half of a restart.
        while not (ready := ready_of(kernel)).done() and loop.time() < deadline:
            await asyncio.wait({ready}, timeout=deadline - loop.time())
    ready = ready_of(kernel)
    is_there = kernel.has_kernel or getattr(kernel.provisioner, "holds_kernel", False)
    if not ready.done() or (is_there and (ready.cancelled() or ready.exception() is not None)):
        kernel._ready = loop.create_future()
        kernel._ready.set_result(None)


def let_go(kernel: Any) -> None:
    """The manager is dropped: it must neither start its kernel again, nor keep a socket, by which a process hangs."""
    kernel.stop_restarter()
    kernel._close_control_socket()


# -- What a server that ends does with kernels that run on: nothing but to say so. --


# Seconds for which websockets may take what is to be said last.
FLUSH_SECONDS = 1.0


async def leave_kernels(manager: Any) -> None:
    """Let go of the kernels that run on Slurm's nodes, and close the service; starts are given up, with their jobs."""
    manager.restorer.is_leaving = True
    service = SlurmService.instance(manager.log)
    left = {kernel_id: kernel for kernel_id, kernel in manager._kernels.items() if _runs_on(kernel)}
    reason = "the server was stopped before the kernel had this cell: run it again"
    channels = [one for kernel_id in left for one in manager.frontends.of(kernel_id)]
    for one in channels:
        one.give_back(reason)
    if channels:
        await asyncio.wait([asyncio.ensure_future(one.flushed()) for one in channels], timeout=FLUSH_SECONDS)
    jobs = sorted({str(kernel.provisioner.jobid) for kernel in left.values()})
    for kernel_id in left:
        manager.frontends.leave(kernel_id, "the server was stopped")
        manager.restorer.let_go(kernel_id)
    if left:
        manager.log.warning(
            "%s left running, in jobs %s: a server that is started %s has them again; else they end",
            "1 kernel" if len(left) == 1 else f"{len(left)} kernels",
            ", ".join(jobs),
            f"within {service.orphan_timeout:g} s" if service.orphan_timeout else "some time",
        )
    # Starts that wait, and what does not run on Slurm, end before it.
    others = list(manager._kernels)
    await shutdown_each(manager, others)
    try:
        await asyncio.to_thread(service.close, leave=True)
    except Exception:
        # The process is to end all the same; kernels and records outlive it in any case.
        manager.log.exception("the service did not close in good order")


async def shutdown_each(manager: Any, kernel_ids: list[str], now: bool = False) -> None:
    """Shut these kernels down; one that cannot be is logged, and keeps nobody from going on."""
    ends = [manager.shutdown_kernel(kernel_id, now=now) for kernel_id in kernel_ids]
    for kernel_id, error in zip(kernel_ids, await asyncio.gather(*ends, return_exceptions=True), strict=True):
        if isinstance(error, BaseException):
            manager.log.error("kernel %s was not shut down in good order", kernel_id, exc_info=error)


def _runs_on(kernel: Any) -> bool:
    """Whether it has a process on a node, which does not need this server."""
    provisioner = getattr(kernel, "provisioner", None)
    return (
        isinstance(provisioner, SlurmProvisioner)
        and ready_of(kernel).done()
        and provisioner.has_process
        and kernel.execution_state != "dead"
    )


# -- What goes with the kernel manager in the Jupyter server that has it. --


# Seconds for which a Jupyter server that starts waits for its kernels of before.
RESTORE_SECONDS = 20.0


def go_with(manager: SlurmMappingKernelManager, app: Any) -> None:
    """Choose what goes with this manager, where nothing else is configured; called while the server is set up."""
    chosen = app.config.get(type(app).__name__, {})
    if "kernel_websocket_connection_class" not in chosen:
        app.kernel_websocket_connection_class = SlurmWebsocketConnection
    if getattr(app, "restores_kernels", False):
        return  # it sees to the rest itself
    if "session_manager_class" not in chosen:
        app.session_manager_class = SlurmSessionManager
    if hasattr(app, "port"):
        SlurmService.instance(manager.log).leave_at_exit = not manager.kill_kernels_on_exit
        # The first thing that the loop does, before it listens: nobody is to be told that there are no kernels.
        IOLoop.current().add_callback(restore_before_listening, manager, app)


def restore_before_listening(manager: SlurmMappingKernelManager, app: Any) -> None:
    """Have the kernels of this server's earlier process; a store that cannot be used is not the server's end."""
    manager.restorer.restore_now(server_deployment(app.port), RESTORE_SECONDS)
    if manager.restorer.failure is not None:
        manager.log.error("kernels of before are not restored, and none is started: %s", manager.restorer.failure)


# -- The kernel manager of a server whose kernels wait in Slurm's queue: the gateway's, and a Jupyter server's. --


# A start that is given up has its job cancelled; longer than this nobody waits for that.
CANCEL_SECONDS = 5.0


class SlurmMappingKernelManager(AsyncMappingKernelManager):
    """Kernels by id, each with an owner; "" owns those of a server with one user."""

    max_kernels = CInt(0, config=True, help="Kernels, starting ones included, that there may be. 0: any number.")
    max_kernels_per_user = CInt(
        0, config=True, help="Kernels, starting ones included, that one user may have. 0: any number."
    )
    dead_kernel_linger = CFloat(
        600.0,
        config=True,
        help="Seconds for which a kernel that died, or did not start, is still shown with its reason.",
    )
    kill_kernels_on_exit = Bool(
        False,
        config=True,
        help="""Whether kernels on Slurm end with the server. Default: they run on, and the server that is started
        next has them again; without one they end after SlurmService.orphan_timeout.""",
    )

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Owner and maker: a service that starts kernels for others goes on to see to them.
        self._owners: dict[str, tuple[str, str]] = {}
        self.frontends = Frontends(self, self._why_dead)
        self.restorer = KernelRestorer(self)
        self._lingering: dict[str, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._ending: dict[str, asyncio.Task[None]] = {}
        self._restarting: dict[str, asyncio.Task[Any]] = {}
        if self.parent is not None:
            go_with(self, self.parent)

    @default("use_pending_kernels")
    def _default_use_pending_kernels(self) -> bool:
        return True

    @default("context")
    def _context_default(self) -> Any:
        return with_room(super()._context_default())

    # -- whose they are ---------------------------------------------------------------------------

    def is_visible(self, kernel_id: str, user: Any) -> bool:
        """Whether the kernel is there, and ``user``'s to see: an owner's, its maker's, an admin's."""
        if user is None or kernel_id not in self:
            return False
        owner, maker = self._owners.get(kernel_id, ("", ""))
        return sees(user, owner, maker)

    def models_for(self, user: Any) -> list[dict[str, Any]]:
        """The models of the kernels that ``user`` may see."""
        return [self.kernel_model(kernel_id) for kernel_id in list(self._kernels) if self.is_visible(kernel_id, user)]

    def owner_of(self, kernel_id: str) -> str:
        """Whom the kernel belongs to."""
        return self._owners.get(kernel_id, ("", ""))[0]

    def maker_of(self, kernel_id: str) -> str:
        """Who asked for it."""
        return self._owners.get(kernel_id, ("", ""))[1]

    def check_limits(self, owner: str, elsewhere: Mapping[str, str] = MappingProxyType({})) -> None:
        """Raise HTTPError 429 for one kernel more; ``elsewhere`` are those of other gateways, and their owners."""
        others = {kernel_id: whose for kernel_id, whose in elsewhere.items() if kernel_id not in self}
        living = [kernel_id for kernel_id in self._kernels if not self._is_dead(kernel_id)]
        mine = [*map(self.owner_of, living), *others.values()].count(owner)
        for limit, count, name in (
            (self.max_kernels, len(living) + len(others), "max_kernels"),
            (self.max_kernels_per_user, mine, "max_kernels_per_user"),
        ):
            if 0 < limit <= count:
                whose = "of yours " if name == "max_kernels_per_user" else ""
                raise web.HTTPError(
                    429,
                    f"{count} kernels {whose}run or wait already, and {limit} is the limit "
                    f"({type(self).__name__}.{name}): shut one down first",
                )

    # -- start --------------------------------------------------------------------------------------

    async def _async_start_kernel(
        self,
        *,
        kernel_id: str | None = None,
        owner: str = "",
        maker: str = "",
        fields: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> str:
        """Begin a start and return the kernel's id at once.

        ``owner`` is the user whom it belongs to, ``maker`` who asked for it; ``fields`` are request fields
        that were checked already.

        Raises HTTPError 429 over a limit and 409 for an id that is taken.
        """
        self.check_limits(owner)
        kernel_id = kernel_id or self.new_kernel_id(**kwargs)
        if kernel_id in self:
            raise web.HTTPError(409, f"there is a kernel {kernel_id} already")
        if fields:  # a kernel on Slurm, which has some
            kwargs |= {"slurm_owner": owner, "slurm_fields": fields}
        self._owners[kernel_id] = owner, maker
        try:
            return str(await super()._async_start_kernel(kernel_id=kernel_id, **kwargs))
        except BaseException:
            self._forget(kernel_id)
            raise

    start_kernel = _async_start_kernel  # type: ignore[assignment]

    async def _finish_kernel_start(self, kernel_id: str) -> None:
        reason = await self._until_ready(kernel_id)
        if reason and kernel_id in self:
            self._die(kernel_id, reason)
        elif not reason:
            await super()._finish_kernel_start(kernel_id)
            kernel: Any = self._kernels[kernel_id]
            if kernel.execution_state == "starting":
                kernel.execution_state = "idle"  # it listens, and its first words were before anybody heard them
            self.restorer.remember(kernel_id)
            self.follow_restarts(kernel_id)
            self._own(self._watch(kernel_id, kernel))

    def update_env(self, *, kernel_id: str, env: dict[str, str]) -> None:
        """What the kernel's next process gets: its document was renamed."""
        super().update_env(kernel_id=kernel_id, env=env)
        if kernel_id in self and ready_of(self._kernels[kernel_id]).done():
            self.restorer.remember(kernel_id)

    async def _watch(self, kernel_id: str, kernel: Any) -> None:
        """Tell at once that a kernel's allocation is over: no restarter can help there."""
        if not isinstance(kernel.provisioner, SlurmProvisioner):
            return
        kernel.provisioner.on_moved = lambda: self.frontends.moved(kernel_id)
        reason = await kernel.provisioner.until_over()
        known: Any = self._kernels.get(kernel_id)
        if known is kernel and not known.shutting_down and not self._is_dead(kernel_id):
            kernel.stop_restarter()
            self._die(kernel_id, reason)

    async def _until_ready(self, kernel_id: str) -> str:
        """Wait for the start's end; return why it failed, or nothing."""
        kernel: Any = self._kernels.get(kernel_id)
        if kernel is None:
            return "the kernel is over"
        ready = ready_of(kernel)
        await asyncio.wait({ready})
        error = None if ready.cancelled() else ready.exception()
        if ready.cancelled():
            return "its start was cancelled"
        return words_of(error) if error is not None else ""

    async def _add_kernel_when_ready(self, kernel_id: str, km: Any, kernel_awaitable: Any) -> None:
        try:
            await kernel_awaitable
        except Exception as error:  # noqa: BLE001 - whatever it is, ``ready`` carries it to whom it concerns
            self.log.debug("kernel %s did not start: %s", kernel_id, printable(error))
        finally:
            self._pending_kernels.pop(kernel_id, None)

    # -- the end ------------------------------------------------------------------------------------

    def _is_dead(self, kernel_id: str) -> bool:
        return getattr(self._kernels.get(kernel_id), "execution_state", "") == "dead"

    def _die(self, kernel_id: str, reason: str) -> None:
        """It is dead, and is shown so for a while, with the reason."""
        kernel = self._kernels.get(kernel_id)
        if kernel is None or kernel_id in self._lingering:
            return
        self.stop_watching_activity(kernel_id)
        kernel.execution_state, kernel.reason = "dead", reason
        self.log.warning("kernel %s is dead: %s", kernel_id, printable(reason))
        for channels in self.frontends.of(kernel_id):
            channels.fail(reason)
        loop = asyncio.get_running_loop()
        self._lingering[kernel_id] = loop.call_later(self.dead_kernel_linger, self._bury, kernel_id)

    def _bury(self, kernel_id: str) -> None:
        self._own(self._remove_dead(kernel_id))

    def _own(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run as a task that ``shutdown_all`` cancels."""
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _async_shutdown_all(self, now: bool = False) -> None:
        """The server ends: so do kernels and starts, and what is under way for them. Those on Slurm may be left."""
        if not self.kill_kernels_on_exit:
            await leave_kernels(self)
        await shutdown_each(self, list(self._kernels), now)
        for task in list(self._tasks):
            task.cancel()

    shutdown_all = _async_shutdown_all  # type: ignore[assignment]

    async def _remove_dead(self, kernel_id: str) -> None:
        if kernel_id in self and self._is_dead(kernel_id):
            await self.shutdown_kernel(kernel_id, now=True)

    def _handle_kernel_died(self, kernel_id: str) -> None:
        """The restarter has given up."""
        if kernel_id in self:
            reason = getattr(self._kernels[kernel_id].provisioner, "exit_reason", "")
            self._die(kernel_id, reason or "it died, and was not restarted")

    async def _async_shutdown_kernel(
        self, kernel_id: str, now: bool | None = False, restart: bool | None = False
    ) -> None:
        """End a kernel, or give up its start; returns when it is over, and its job cancelled or left."""
        self._check_kernel_id(kernel_id)
        if kernel_id not in self._ending:
            ending = self._ending[kernel_id] = asyncio.ensure_future(self._end(kernel_id, bool(now)))
            ending.add_done_callback(lambda _ending: self._ending.pop(kernel_id, None))
        # Who asks may go away; the kernel's end goes on.
        await asyncio.shield(self._ending[kernel_id])

    shutdown_kernel = _async_shutdown_kernel  # type: ignore[assignment]

    async def _end(self, kernel_id: str, now: bool) -> None:
        kernel = self._kernels[kernel_id]
        starting = self._pending_kernels.get(kernel_id)
        if starting is not None and not ready_of(kernel).done():
            await self._give_up(kernel_id, starting)
            return
        await end_restart(kernel, self._restarting.get(kernel_id))
        await super()._async_shutdown_kernel(kernel_id, now=now)
        stopping = self._pending_kernels.get(kernel_id)
        if stopping is not None:
            await asyncio.wait({stopping})
        if isinstance(kernel.provisioner, SlurmProvisioner):
            # Whatever became of the manager's own shutdown: the job must not stay, nor be shown.
            await kernel.provisioner.cleanup()
            self._pending_kernels.pop(kernel_id, None)
            self.remove_kernel(kernel_id)
        self._forget(kernel_id)

    async def _give_up(self, kernel_id: str, starting: asyncio.Task[None]) -> None:
        kernel = self._kernels[kernel_id]
        KERNEL_CURRENTLY_RUNNING_TOTAL.labels(type=kernel.kernel_name).dec()
        starting.cancel()
        await asyncio.wait({starting}, timeout=CANCEL_SECONDS)
        self._pending_kernels.pop(kernel_id, None)
        self.remove_kernel(kernel_id)
        self._forget(kernel_id)

    def remove_kernel(self, kernel_id: str) -> Any:
        kernel: Any = super().remove_kernel(kernel_id)
        if kernel is not None:
            let_go(kernel)
        self._forget(kernel_id)
        return kernel

    def _forget(self, kernel_id: str) -> None:
        if kernel_id in self._kernels:
            return
        self._owners.pop(kernel_id, None)
        finishing = self._pending_kernel_tasks.pop(kernel_id, None)
        if finishing is not None and finishing is not asyncio.current_task():
            finishing.cancel()
        timer = self._lingering.pop(kernel_id, None)
        if timer is not None:
            timer.cancel()
        self.frontends.close(kernel_id, "the kernel was shut down")

    # -- restart, interrupt ---------------------------------------------------------------------------

    async def _async_restart_kernel(self, kernel_id: str, now: bool = False) -> Any:
        """Restart in the same allocation. Raises HTTPError 409, with the reason, where that cannot be."""
        kernel = self._ready_kernel(kernel_id, "restarted")
        waiting = self.frontends.of(kernel_id)
        for channels in waiting:
            channels.hold()
        was_dead = kernel_id in self._lingering
        if was_dead:
            self._lingering.pop(kernel_id).cancel()
        kernel.execution_state = "restarting"
        restart = super()._async_restart_kernel(kernel_id, now=now)
        restarting = self._restarting[kernel_id] = asyncio.ensure_future(restart)
        try:
            result = await asyncio.shield(restarting)
        except Exception as error:
            self._die(kernel_id, words_of(error))
            status = 409 if isinstance(error, GatewaySlurmError) else 500
            raise web.HTTPError(status, f"the kernel was not restarted: {words_of(error)}") from error
        except asyncio.CancelledError:
            if restarting.cancelled():
                raise web.HTTPError(409, "the kernel was shut down while it was restarted") from None
            raise
        finally:
            if self._restarting.get(kernel_id) is restarting:
                del self._restarting[kernel_id]
        if was_dead:
            self.start_watching_activity(kernel_id)
        kernel.execution_state = "starting"
        await asyncio.gather(*(channels.resume() for channels in waiting))
        if kernel.execution_state == "starting":
            kernel.execution_state = "idle"
        return result

    restart_kernel = _async_restart_kernel  # type: ignore[assignment]

    def _ready_kernel(self, kernel_id: str, verb: str) -> Any:
        self._check_kernel_id(kernel_id)
        kernel = self._kernels[kernel_id]
        if not ready_of(kernel).done():
            raise web.HTTPError(409, f"the kernel is still starting and cannot be {verb}; it can be shut down")
        return kernel

    async def interrupt_kernel(self, kernel_id: str) -> None:  # type: ignore[override]
        """Raises HTTPError 409 while it starts."""
        await self._ready_kernel(kernel_id, "interrupted").interrupt_kernel()

    # -- what is told -----------------------------------------------------------------------------------

    def kernel_model(self, kernel_id: str) -> dict[str, Any]:
        """Jupyter's model, with ``reason`` in words and ``slurm``: the job, its state, where it waits and runs."""
        model: dict[str, Any] = super().kernel_model(kernel_id)
        model.update(slurm_model(self._kernels[kernel_id]))
        return model

    # -- frontends --------------------------------------------------------------------------------------

    def channels_of(self, kernel_id: str, session_id: str) -> KernelChannels:
        """The session's channels to the kernel, made when they are first asked for."""
        self._check_kernel_id(kernel_id)
        return self.frontends.channels(kernel_id, session_id)

    async def _why_dead(self, kernel_id: str) -> str:
        reason = await self._until_ready(kernel_id)
        kernel = self._kernels.get(kernel_id)
        return reason or (str(kernel.reason) if kernel is not None and self._is_dead(kernel_id) else "")

    def follow_restarts(self, kernel_id: str) -> None:
        """Have frontends told of the restarter's restarts; once for each kernel, which has a restarter by then."""
        self.add_restart_callback(kernel_id, lambda: self.frontends.follow_restart(kernel_id))

    def detached(self, kernel_id: str, channels: KernelChannels) -> None:
        """A websocket closed."""
        self.frontends.detached(kernel_id, channels)

    # -- idle kernels --------------------------------------------------------------------------------------

    def start_watching_activity(self, kernel_id: str) -> None:
        """Follow what the kernel does, until ``stop_watching_activity``."""
        kernel: Any = self._kernels[kernel_id]
        kernel._activity_stream = Activity(self, kernel, self.frontends.delivery(kernel_id))

    async def cull_kernel_if_idle(self, kernel_id: str) -> None:
        """Cull one that idles; one that waits in the queue does not, and a dead one is shown for a while."""
        kernel = self._kernels.get(kernel_id)
        if kernel is not None and ready_of(kernel).done() and not self._is_dead(kernel_id):
            await super().cull_kernel_if_idle(kernel_id)

    def counts(self) -> Iterator[tuple[str, int]]:
        """How many kernels are in which state."""
        yield from sorted(Counter(str(kernel.execution_state) for kernel in self._kernels.values()).items())
