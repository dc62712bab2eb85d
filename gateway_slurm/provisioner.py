"""``slurm-provisioner``: runs the kernel of a kernelspec on a Slurm node, for jupyter_client.

The contract is ``jupyter_client.provisioning.KernelProvisionerBase``. jupyter_client calls a provisioner from whatever
loop it has, or from a new one each time, so every call is passed to the service's own thread.

A start of a kernel goes through these places:

1. ``provisioner.SlurmProvisioner.launch_kernel``: the kernelspec's request and the kernel's command;
2. ``service.SlurmService.start_kernel``: the store and the response socket are open;
3. ``kernels.held.Kernels.start``: the owner may start it, and the project has an account;
4. ``allocations.manager.Allocations.acquire``: an allocation with a place, new, shared or adopted;
5. ``allocations.start``: a launcher in the allocation, as the job's script or as a job step;
6. ``launchers.main`` on the node: the launcher dials the server and says HELLO;
7. ``kernels.process.KernelProcess.start``: the transport is selected, and START goes to the launcher;
8. ``launchers.kernel`` on the node: the kernel's process; STARTED comes back once it listens.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from string import Template
from typing import Any, TypeVar

import zmq
from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager, NoSuchKernel
from jupyter_client.provisioning.provisioner_base import KernelProvisionerBase

from gateway_slurm._jupyter_compat import (
    allow_restarts,
    polling_restarter,
    refuse_restarts,
    renew_control_socket,
    report,
)
from gateway_slurm.config import port_range
from gateway_slurm.environment import DEFAULT_UMASK, fill_placeholders, kernel_environment, own_umask
from gateway_slurm.errors import GatewaySlurmError, KernelStartError, LinkError, RequestError
from gateway_slurm.events import by_of, outcome_of, reason_of
from gateway_slurm.kernels.held import KernelHandle
from gateway_slurm.kernels.model import KernelLaunch, Phase
from gateway_slurm.kernels.restore import RestoredKernel
from gateway_slurm.kernels.transport import choose_mode
from gateway_slurm.link.journal import JournalReading
from gateway_slurm.request import parse_request
from gateway_slurm.service import SlurmService
from gateway_slurm.slurm.sudo.runner import process_user
from gateway_slurm.slurm.url import parse_cluster_url

T = TypeVar("T")

_BASE_ARGUMENTS = ("kernel_id", "kernel_spec", "parent")
# Seconds that a shutdown request waits for the kernel's end before the manager polls.
SHUTDOWN_WAIT = 1.0
_PYTHON_NAMES = ("python", f"python{sys.version_info[0]}", "python{}.{}".format(*sys.version_info))
# The key of the provisioner's own state on record, beside the kernel manager's.
_STATE_KEY = "provisioner"


def _reported(method: Callable[..., Coroutine[Any, Any, T]]) -> Callable[..., Coroutine[Any, Any, T]]:
    """Report an error of a start once. No frames of this package are shown: the message has all that a user needs."""

    @functools.wraps(method)
    async def call(self: SlurmProvisioner, *args: Any, **kwargs: Any) -> T:
        try:
            return await method(self, *args, **kwargs)
        except GatewaySlurmError as error:
            # A gateway's admin must not read what a user's kernel printed.
            text = reason_of(error) if self._owner else error
            report(error, self.parent, self.log, f"kernel {self.kernel_id} was not started: {text}")
            raise error.with_traceback(None) from None

    return call


class SlurmProvisioner(KernelProvisionerBase):
    """Runs the kernel of a kernelspec on a Slurm node.

    ``metadata.kernel_provisioner.config`` of the kernelspec has the request fields. They arrive here as keywords and
    are untrusted, so they set no trait.
    """

    def __init__(self, **kwargs: Any) -> None:
        base_arguments = {name: kwargs.pop(name) for name in _BASE_ARGUMENTS if name in kwargs}
        kwargs.pop("config", None)
        super().__init__(**base_arguments)
        self._fields: dict[str, Any] = kwargs
        self._owner = self._maker = ""
        # The owner, and the fields that override the kernelspec's. A kernel manager that has checked both gives them
        # at the first start; restarts have the same.
        self._given: tuple[str, dict[str, Any]] | None = None
        self._handle: KernelHandle | None = None
        # The service that started or adopted the kernel; once it is closed, ``service`` is a new one.
        self._kernel_service: SlurmService | None = None
        self._has_process = False
        self._curve: tuple[str, str] | None = None
        self._moved = False
        # Called when the manager has confirmed a start or restart; True: the kernel has another address than before.
        self.on_started: Callable[[bool], None] = lambda _moved: None
        # Called on the service's thread when the kernel's process has ended; it must return at once and raise nothing.
        self.on_death: Callable[[], None] = lambda: None

    # -- The service --------------------------------------------------------------------------

    @property
    def service(self) -> SlurmService:
        """The service of this process."""
        return SlurmService.instance(self.log)

    async def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return await self.service.run(coroutine)

    @property
    def _is_closed(self) -> bool:
        """Whether the service that has the kernel was closed, and its kernels with it."""
        return self._kernel_service is not None and self._kernel_service.is_closed

    @property
    def holds_kernel(self) -> bool:
        """Whether there is a kernel, dead or alive, with a place in a job that ``cleanup`` releases."""
        return self._handle is not None

    @property
    def jobid(self) -> str | None:
        """The Slurm job that the kernel runs in."""
        return self._handle.allocation.jobid if self._handle else None

    @property
    def node(self) -> str | None:
        """The node that the kernel runs on."""
        return self._handle.process.launcher.node if self._handle else None

    @property
    def connect(self) -> dict[str, str] | None:
        """How clients reach the kernel, ``direct`` or ``tunnel``, and why; None before that is known."""
        return self._handle.process.connect if self._handle else None

    @property
    def directory(self) -> dict[str, str] | None:
        """Where the kernel started on its node (``path``), and ``why`` not elsewhere; None before that is known."""
        process = self._handle.process if self._handle else None
        return {"path": process.directory, "why": process.directory_why} if process and process.directory else None

    @property
    def exit_reason(self) -> str:
        """Why the kernel ended, in words; empty while it lives."""
        return self._handle.process.reason if self._handle else ""

    @property
    def is_dead(self) -> bool:
        """Whether the kernel's process has ended, and no restart has begun."""
        return self._handle is not None and self._handle.process.phase is Phase.DEAD

    @property
    def can_restart(self) -> bool:
        """Whether the kernel may be started again in its place, as far as is known."""
        return self._handle is not None and not self._is_closed and self._handle.can_restart

    # -- Start --------------------------------------------------------------------------------

    @_reported
    async def pre_launch(self, **kwargs: Any) -> dict[str, Any]:
        """Called before each start. Raises RequestError when the kernelspec asks for something invalid.

        A kernel manager of several users' kernels passes ``slurm_owner`` (a user's name; default: the user of this
        process), ``slurm_maker`` (the name of the user or service that asked, for events) and ``slurm_fields`` (request
        fields that override the kernelspec's) to ``start_kernel``. They count at the first start; a kernelspec cannot
        set them.
        """
        if self.parent is not None:
            renew_control_socket(self.parent)
        try:
            self._maker = str(kwargs.pop("slurm_maker", None) or "")
            return await self._prepare(**kwargs)
        except RequestError as error:
            user, name = kwargs.get("slurm_owner") or process_user(), getattr(self.parent, "kernel_name", "")
            facts = {"user": user, "by": by_of(user, self._maker), "kernel_id": self.kernel_id, "kernelspec": name}
            facts["outcome"] = outcome_of(error)
            self.service.events.emit("kernel_refused", **facts, reason=reason_of(error))
            raise

    async def _prepare(self, **kwargs: Any) -> dict[str, Any]:
        given = str(kwargs.pop("slurm_owner", None) or ""), dict(kwargs.pop("slurm_fields", None) or {})
        self._owner, overrides = self._given = self._given or given
        language = getattr(self.kernel_spec, "language", "") or ""
        self._request = parse_request({**self._fields, **overrides}, spec_language=language)
        env = kwargs.pop("env", None)
        # The base class copies the server's whole environment; the kernel gets only what is meant for it.
        kwargs["env"] = kernel_environment(os.environ if env is None else env)
        wrapped = None if self._request.kernel_argv else self._wrapped_spec()
        for name, value in (wrapped.env if wrapped else {}).items():
            kwargs["env"][name] = Template(value).safe_substitute(kwargs["env"])
        if language.lower() == "python":
            # Else debugpy, which ipykernel imports, warns of Python's frozen modules in the log of each kernel.
            kwargs["env"].setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
        extra = list(kwargs.pop("extra_arguments", []))
        kwargs = await super().pre_launch(**kwargs)
        kwargs["env"] = {str(name): str(value) for name, value in kwargs["env"].items() if value is not None}
        resources = str((wrapped or self.kernel_spec).resource_dir or "")
        self._argv = [fill_placeholders(str(item), resources) for item in [*self._kernel_argv(wrapped), *extra]]
        return {**kwargs, "cmd": self._argv}

    def _kernel_argv(self, wrapped: KernelSpec | None) -> list[str]:
        """The wrapped kernel's command: given in the request, or that of an installed kernelspec."""
        if wrapped is None:
            return list(self._request.kernel_argv)
        program, *arguments = wrapped.argv or [""]
        # As KernelManager.format_kernel_cmd does: in an installed kernelspec this name means the server's Python.
        return [sys.executable if program in _PYTHON_NAMES else program, *arguments]

    def _wrapped_spec(self) -> KernelSpec:
        name = self._request.kernel_name or ""
        manager = getattr(self.parent, "kernel_spec_manager", None) or KernelSpecManager()
        # A gateway offers only wrapped kernels: unwrapped they would run on the gateway's host.
        find = getattr(manager, "wrapped_spec", manager.get_kernel_spec)
        try:
            return find(name)
        except NoSuchKernel as error:
            known = ", ".join(sorted(manager.find_kernel_specs()))
            raise RequestError(
                f"kernel_name: there is no kernelspec {name!r} to wrap (installed are {known})", field="kernel_name"
            ) from error

    @_reported
    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> KernelConnectionInfo:
        """Start the kernel and return its connection info once it listens; the job may wait in Slurm's queue."""
        try:
            launch = self._launch(cmd, kwargs)
            if self._handle is None:
                service = self.service
                state = {_STATE_KEY: {"fields": self._given[1] if self._given else {}}}
                start = service.start_kernel(self.kernel_id, self._request, launch, self._owner, state, self._maker)
                self._attach(await service.run(start), service)
            else:
                await self._call(self._handle.restart(launch))
        except asyncio.CancelledError:
            settle_cancelled_start(self.parent)
            raise
        assert self._handle is not None
        self._has_process = True
        before, info = self.connection_info, self._handle.process.connection_info()
        self.connection_info = info  # type: ignore[assignment]
        self._moved = bool(before) and before != info
        if "curve_publickey" not in info:  # the kernel has none any more
            self._manager.curve_publickey = self._manager.curve_secretkey = None
        return self.connection_info

    def _attach(self, handle: KernelHandle, service: SlurmService) -> None:
        self._handle, self._kernel_service = handle, service
        handle.on_death = self._after_death

    def _launch(self, cmd: list[str], kwargs: dict[str, Any]) -> KernelLaunch:
        service = self.service
        mode, why = self._choose_mode()
        connection = {
            "key": bytes(self._manager.session.key).decode(),
            "signature_scheme": self._manager.session.signature_scheme,
            "kernel_name": str(getattr(self.parent, "kernel_name", "") or ""),
            "jupyter_session": kwargs["env"].get("JPY_SESSION_NAME", ""),
        }
        if mode != "ipc":
            connection["curve_publickey"], connection["curve_secretkey"] = self._curve_keys()
        return KernelLaunch(
            argv=tuple(cmd),
            env=service.users.environment(self._owner, kwargs["env"]),
            cwd=self._client_directory(kwargs.get("cwd")),
            directory=self._request.directory,
            default_directory=self._request.default_directory,
            connection=connection,
            mode=mode,
            why=why,
            language=(self._request.kernel_language or "").lower(),
            start_timeout=service.start_timeout,
            port_range=port_range(service.kernel_ports),
            log_dir=service.log_directory,
            umask=self._umask(),
        )

    def _umask(self) -> int:
        """The admin's; else that of this process, if it is the user's own, on the cluster: sbatch(1) does the same."""
        service = self.service
        if service.umask:
            return int(service.umask, 8)
        own = not self._owner and parse_cluster_url(service.cluster).kind == "local"
        return own_umask() if own else DEFAULT_UMASK

    def _client_directory(self, cwd: Any) -> str | None:
        """The directory that a client gave, for the node to look for; this host's file system is not asked.

        nbconvert gives a path relative to its own. An owner's client is on another host, where this process's own
        directory means nothing.
        """
        path = str(cwd or "")
        if not path:
            return None
        return path if self._owner or path.startswith("~") else os.path.abspath(path)

    @property
    def _manager(self) -> Any:
        """The KernelManager, which passes the connection info on to clients. Raises KernelStartError without one."""
        if self.parent is None:
            raise KernelStartError("slurm-provisioner needs a KernelManager as its parent")
        return self.parent

    def _curve_keys(self) -> tuple[str, str]:
        """The kernel's Curve keys: the manager's where it has some, else new ones; a restart keeps them."""
        if self._curve is None:
            public, secret = self._manager.curve_publickey, self._manager.curve_secretkey
            if not public or not secret:
                public, secret = zmq.curve_keypair()
            self._curve = public.decode(), secret.decode()
        return self._curve

    def _choose_mode(self) -> tuple[str, str]:
        metadata = getattr(self.kernel_spec, "metadata", None) or {}
        if "supported_encryption" not in metadata and not self._request.kernel_argv:
            metadata = self._wrapped_spec().metadata or {}
        # Only our multi-kernel manager shows kept output to frontends.
        shows_kept = getattr(getattr(self.parent, "parent", None), "has_frontends", False)
        return choose_mode(
            self._request.connect,
            self.service.connect,
            metadata,
            curve_required=getattr(self.parent, "transport_encryption", "disabled") == "required",
            keeps_output=bool(shows_kept and self.service.kept_output),
        )

    async def until_over(self) -> str:
        """Wait until the kernel is dead and cannot be restarted in its allocation; return why, and what to do."""
        return "" if self._handle is None else await self._call(self._handle.until_over())

    def _after_death(self) -> None:
        """The kernel's process has ended: wake the restarter. Called on the service's loop."""
        if not self._is_closed:
            wake_restarter(self.parent, lambda: self.is_dead)
            self.on_death()

    async def post_launch(self, **kwargs: Any) -> None:
        """Called when the manager has the kernel: the server does not release it by itself any more."""
        if self._handle is None:
            return
        try:
            await self._call(self._handle.confirm())
        except asyncio.CancelledError:
            # The last moment in which a start can be cancelled: its kernel must not stay.
            settle_cancelled_start(self.parent)
            handle, self._handle, self._has_process = self._handle, None, False
            self.service.submit(handle.release())
            raise
        allow_restarts(self.parent)
        moved, self._moved = self._moved, False
        self.on_started(moved)

    # -- From one server process to the next ----------------------------------------------------

    def remember(self, manager_state: dict[str, Any]) -> None:
        """Record, encrypted, what another process needs to make the kernel manager again.

        JSON values only. Keys that an earlier call gave, and this one does not, stay. A kernel has no record before its
        start is done; such a call does nothing. Any thread may call it; it returns at once.
        """
        handle, service = self._handle, self._kernel_service
        if handle is not None and service is not None and not service.is_closed:
            service.submit(_now(handle.remember, manager_state))

    def adopt(self, restored: RestoredKernel) -> dict[str, Any]:
        """Become the provisioner of a kernel that an earlier server started, as if this process had started it.

        Returns the complete connection info, for ``KernelManager.load_connection_info``; ``restored.record.manager``
        has what was remembered. Any thread may call it; it returns at once.
        """
        record = restored.record
        info = restored.handle.process.connection_info()
        self._attach(restored.handle, self.service)
        self._has_process = True
        self._owner = record.owner
        self._given = record.owner, dict(record.manager.get(_STATE_KEY, {}).get("fields", {}))
        if "curve_publickey" in info:
            self._curve = info["curve_publickey"], info["curve_secretkey"]
        self.connection_info = info  # type: ignore[assignment]
        return info

    def show_warnings(self, show: Callable[[str], None]) -> None:
        """Give warnings of the kernel's end to ``show``, and write none to its standard error.

        ``show`` gets the text. The service's thread calls it: it must return at once and raise nothing.
        """
        if self._handle is not None:
            self._handle.process.show_warning = show

    @property
    def start_note(self) -> str:
        """What the kernel's users must know about its start, for the first cell; "" for nothing."""
        return self._handle.process.directory_note if self._handle else ""

    async def read_logs(self) -> dict[str, str]:
        """The ends of the kernel's log (``kernel``) and of its launcher's (``launcher``). Raises LinkError."""
        if self._handle is None:
            raise LinkError("the kernel is not running, so its node cannot be asked for its log")
        return await self._call(self._handle.process.launcher.read_logs(self.kernel_id))

    # -- Life ---------------------------------------------------------------------------------

    @property
    def _runs_on(self) -> bool:
        """Whether the service was closed and left the kernel running: it is the next server's to ask and to end."""
        return self._handle is not None and self._is_closed and self._handle.process.phase is not Phase.DEAD

    @property
    def has_process(self) -> bool:
        """Whether the manager has started a kernel and not cleaned up after it."""
        return self._has_process

    async def poll(self) -> int | None:
        """The exit code or minus the signal; None while the kernel lives or its state is unknown. Reads memory only.

        A restarter polls before it restarts: where the kernel's job ends, it reports the death and restarts nothing.
        """
        if self._handle is None or not self._has_process:
            return 0
        if self.is_dead and not self.can_restart:
            refuse_restarts(self.parent)
        return self._handle.process.returncode

    async def wait(self) -> int | None:
        """Wait for the kernel's end, and return as ``poll`` does; None at once where the kernel runs on."""
        returncode = await self.poll()
        if self._handle is not None and returncode is None and not self._runs_on:
            returncode = await self._call(self._handle.process.wait())
        self._has_process = False
        return returncode

    @property
    def has_journal(self) -> bool:
        """Whether the kernel's launcher keeps a journal of its output: it does for each kernel behind the tunnel."""
        return self._handle is not None and not self._is_closed and self._handle.process.has_journal

    def read_journal(self, start: int | None = None, upto: int = 0, **counted: Any) -> JournalReading:
        """Read the kernel's journal on the caller's loop; an exited kernel has it until ``cleanup``.

        ``start`` is the number of the first message (None: where the last server had read up to), ``upto`` of the last
        one (0: there is none). ``counted`` are ``holding``, ``skipped`` and ``turn`` of ``JournalReading``. Raises
        LinkError where the kernel has no journal.
        """
        if self._handle is None or not self.has_journal:
            raise LinkError(f"kernel {self.kernel_id} has no journal of its output")
        process = self._handle.process
        reading = process.read_journal(start, upto, **counted)
        self.service.submit(_now(reading.attach, process.launcher.streams))
        return reading

    def has_delivered(self, number: int) -> None:
        """A server has delivered messages up to this number: those of the kernel's next process have larger ones."""
        if self._handle is not None:
            self._handle.process.has_delivered(number)

    def acknowledge(self, positions: dict[str, int], notes: dict[str, str | None]) -> Future[None] | None:
        """Keep these with the journal for the next server (``KernelProcess.acknowledge``); any thread may call it.

        The future is done once they are on their way to the launcher.
        """
        if self._handle is None or self._is_closed:
            return None
        return self.service.submit(_now(self._handle.process.acknowledge, positions, notes))

    async def send_signal(self, signum: int) -> None:
        """Signal the kernel's process group; a dead kernel gets no signal, which is no error. Raises LinkError."""
        if self._handle is None or not self._has_process or signum == 0:
            return
        if self._handle.process.phase is Phase.DEAD or self._runs_on:
            return
        try:
            await self._call(_now(self._handle.process.signal, signum))
        except LinkError as error:
            # The user must know that an interrupt was not delivered; a shutdown goes on without it.
            if not getattr(self.parent, "shutting_down", False):
                raise
            self.log.warning("kernel %s: %s", self.kernel_id, error)

    async def kill(self, restart: bool = False) -> None:
        """SIGKILL, now. A launcher without a link ends its kernels itself when the job ends."""
        await self._signal_if_linked(signal.SIGKILL)

    async def terminate(self, restart: bool = False) -> None:
        """SIGTERM."""
        await self._signal_if_linked(signal.SIGTERM)

    async def _signal_if_linked(self, signum: int) -> None:
        try:
            await self.send_signal(signum)
        except LinkError as error:
            self.log.warning("kernel %s: %s", self.kernel_id, error)

    async def shutdown_requested(self, restart: bool = False) -> None:
        """The manager has asked the kernel to shut down: wait here up to ``SHUTDOWN_WAIT``, and return at its end.

        After that the manager polls every 100 ms.
        """
        if self._handle is None or self._handle.process.phase is not Phase.RUNNING or self._runs_on:
            return
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._call(self._handle.process.wait()), SHUTDOWN_WAIT)

    async def cleanup(self, restart: bool = False) -> None:
        """Release the kernel; its allocation ends with the last one. On a restart everything stays."""
        if restart or self._handle is None:
            return
        handle, self._handle = self._handle, None
        self._has_process = False
        # When the process ends the service is closed first, and its kernels with it; ``jupyter run`` shuts its kernel
        # down after that.
        if not self._is_closed:
            await self._call(handle.release())

    async def get_provisioner_info(self) -> dict[str, Any]:
        """The base class's, with ``jobid``, ``node``, ``pid``, ``connect`` and ``directory``."""
        info = await super().get_provisioner_info()
        if self._handle is not None:
            process = self._handle.process
            info.update(jobid=self.jobid, node=process.launcher.node, pid=process.pid, connect=self.connect)
            info.update(directory=self.directory)
        return info


async def _now(function: Any, *arguments: Any) -> None:
    """Call a plain function, as a coroutine for the service's loop."""
    function(*arguments)


# -- The parent KernelManager -------------------------------------------------------------------


def settle_cancelled_start(manager: Any) -> None:
    """Leave the kernel manager in order after a start or restart that was cancelled."""
    # Websockets and other callers wait for it.
    ready = getattr(manager, "ready", None)
    if ready is not None and not ready.done():
        ready.set_exception(KernelStartError("the start of the kernel was cancelled"))
        ready.exception()  # retrieved: asyncio logs an exception that is not
    if manager is not None:
        manager.stop_restarter()  # it would find no kernel, and start one in a new job


def wake_restarter(manager: Any, is_dead: Callable[[], bool]) -> None:
    """Have the manager's restarter, if one runs, poll now; by itself it polls every 3 s.

    Any thread may call this; it returns at once. The restarter polls on its own loop, if ``is_dead`` returns True
    there and the kernel has not been shut down or restarted meanwhile.
    """
    polling = polling_restarter(manager)
    if polling is None:
        return
    restarter, periodic = polling

    def poll() -> Any:
        """Poll; returns an awaitable where the manager is asynchronous, which the loop awaits."""
        is_due = not manager.shutting_down and polling_restarter(manager) == polling and is_dead()
        return restarter.poll() if is_due else None

    # Twice: a shutdown that begins in the loop's next round comes first.
    periodic.io_loop.add_callback(periodic.io_loop.add_callback, poll)
