"""``slurm-provisioner``: what jupyter_client asks of a kernel provisioner, as calls to the service.

The contract is ``jupyter_client.provisioning.KernelProvisionerBase``; jupyter_client calls it from
whatever loop it has, or from a new one each time, so every call hands over to the service's thread.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from string import Template
from typing import Any, TypeVar

import zmq
from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager, NoSuchKernel
from jupyter_client.provisioning.provisioner_base import KernelProvisionerBase

from gateway_slurm._jupyter_compat import polling_restarter
from gateway_slurm._util import printable
from gateway_slurm.config import port_range
from gateway_slurm.environment import fill_placeholders, kernel_environment, only_texts
from gateway_slurm.errors import GatewaySlurmError, KernelStartError, LinkError, RequestError
from gateway_slurm.kernels.held import HeldKernel
from gateway_slurm.kernels.model import KernelLaunch, Phase
from gateway_slurm.kernels.restore import Restored
from gateway_slurm.kernels.transport import choose_mode
from gateway_slurm.link.output import Kept
from gateway_slurm.request import KernelRequest, parse_request
from gateway_slurm.service import SlurmService


def start_cancelled(manager: Any) -> None:
    """Leave the kernel manager in order after a start or restart that was cancelled."""
    # Websockets and others wait for it.
    ready = getattr(manager, "ready", None)
    if ready is not None and not ready.done():
        ready.set_exception(KernelStartError("the start of the kernel was cancelled"))
        ready.exception()  # retrieved: asyncio logs an exception that is not
    if manager is not None:
        manager.stop_restarter()  # it would find no kernel, and start one: in a new job


def look_soon(manager: Any, is_dead: Callable[[], bool]) -> None:
    """Have the manager's restarter, if one runs, poll now; by itself it polls every 3 s.

    Any thread may call this; it returns at once. The restarter polls on its own loop, if ``is_dead`` returns True
    there and the kernel has not been shut down or restarted meanwhile.
    """
    polling = polling_restarter(manager)
    if polling is None:
        return
    _restarter, periodic = polling
    loop = periodic.io_loop
    # Twice: a shutdown that begins in the loop's next round comes first.
    loop.add_callback(loop.add_callback, _look, manager, polling, is_dead)


def _look(manager: Any, polling: tuple[Any, Any], is_dead: Callable[[], bool]) -> Any:
    """Poll; returns an awaitable where the manager is asynchronous, which the loop awaits."""
    if manager.shutting_down or polling_restarter(manager) != polling or not is_dead():
        return None
    restarter, _periodic = polling
    return restarter.poll()


T = TypeVar("T")

_OURS = ("kernel_id", "kernel_spec", "parent")
# How long a shutdown that was asked for may take before the manager goes back to polling, in seconds.
SHUTDOWN_NOTICE = 1.0
_OWN_PYTHON = ("python", f"python{sys.version_info[0]}", "python{}.{}".format(*sys.version_info))
# What the provisioner itself has on record beside what the kernel manager tells.
_OWN_STATE = "provisioner"


class SlurmProvisioner(KernelProvisionerBase):
    """Runs the kernel of a kernelspec on a Slurm node.

    ``metadata.kernel_provisioner.config`` of the kernelspec holds the request fields; it arrives
    here as keywords and is untrusted, so it sets no trait.
    """

    def __init__(self, **kwargs: Any) -> None:
        own = {name: kwargs.pop(name) for name in _OURS if name in kwargs}
        kwargs.pop("config", None)
        super().__init__(**own)
        self._fields: dict[str, Any] = kwargs
        # Who the kernel belongs to, and the fields that go over the kernelspec's: given by a kernel manager
        # that has checked both, at the first start, and the same over restarts.
        self._given: tuple[str, dict[str, Any]] | None = None
        self._owner = ""
        self._held: HeldKernel | None = None
        self._has_process = False
        self._curve: tuple[str, str] | None = None
        self._moved = self._waits_until_over = False
        # Called once the manager has it, when a restart has given the kernel another address.
        self.on_moved: Callable[[], None] = lambda: None

    # -- the service --------------------------------------------------------------------------

    @property
    def service(self) -> SlurmService:
        return SlurmService.instance(self.log)

    async def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return await self.service.run(coroutine)

    @property
    def holds_kernel(self) -> bool:
        """Whether there is a kernel, dead or alive, whose place in a job ``cleanup`` gives up."""
        return self._held is not None

    @property
    def jobid(self) -> str | None:
        """The Slurm job that the kernel runs in."""
        return self._held.allocation.jobid if self._held else None

    @property
    def node(self) -> str | None:
        """The node that the kernel runs on."""
        return self._held.process.launcher.node if self._held else None

    @property
    def connect(self) -> dict[str, str] | None:
        """How clients get to the kernel, ``direct`` or ``tunnel``, and why; None before that is known."""
        return self._held.process.connect if self._held else None

    @property
    def exit_reason(self) -> str:
        """Why the kernel ended, in words; empty while it lives."""
        return self._held.process.reason if self._held else ""

    # -- start --------------------------------------------------------------------------------

    async def pre_launch(self, **kwargs: Any) -> dict[str, Any]:
        """Called before each start. Raises RequestError when the kernelspec asks for something invalid.

        A kernel manager of several users' kernels gives ``slurm_owner`` (a user's name; default: the user
        of this process) and ``slurm_fields`` (request fields that go over those of the kernelspec) to
        ``start_kernel``. They count at the first start, and are nothing that a kernelspec could say.
        """
        given = str(kwargs.pop("slurm_owner", None) or ""), dict(kwargs.pop("slurm_fields", None) or {})
        self._given = self._given or given
        self._owner = self._given[0]
        self._request = self._parse()
        env = kwargs.pop("env", None)
        # The base class copies the server's whole environment; the kernel gets what is its own.
        kwargs["env"] = kernel_environment(os.environ if env is None else env)
        wrapped = None if self._request.kernel_argv else self._wrapped_spec()
        for name, value in (wrapped.env if wrapped else {}).items():
            kwargs["env"][name] = Template(value).safe_substitute(kwargs["env"])
        extra = list(kwargs.pop("extra_arguments", []))
        kwargs = await super().pre_launch(**kwargs)
        kwargs["env"] = only_texts(kwargs["env"])
        resources = str((wrapped or self.kernel_spec).resource_dir or "")
        self._argv = [fill_placeholders(str(item), resources) for item in [*self._kernel_argv(wrapped), *extra]]
        return {**kwargs, "cmd": self._argv}

    def _parse(self) -> KernelRequest:
        language = getattr(self.kernel_spec, "language", "") or ""
        fields = {**self._fields, **(self._given[1] if self._given else {})}
        return parse_request(fields, spec_language=language)

    def _kernel_argv(self, wrapped: KernelSpec | None) -> list[str]:
        """The wrapped kernel's command: given in the request, or that of an installed kernelspec."""
        if wrapped is None:
            return list(self._request.kernel_argv)
        program, *arguments = wrapped.argv or [""]
        # As KernelManager.format_kernel_cmd has it: in an installed kernelspec this is the server's Python.
        return [sys.executable if program in _OWN_PYTHON else program, *arguments]

    def _wrapped_spec(self) -> KernelSpec:
        name = self._request.kernel_name or ""
        manager = getattr(self.parent, "kernel_spec_manager", None) or KernelSpecManager()
        # A gateway does not serve what it lets be wrapped: by itself it would run on the gateway's host.
        find = getattr(manager, "wrapped_spec", manager.get_kernel_spec)
        try:
            return find(name)
        except NoSuchKernel as error:
            known = ", ".join(sorted(manager.find_kernel_specs()))
            raise RequestError(
                f"kernel_name: there is no kernelspec {name!r} to wrap (installed are {known})", field="kernel_name"
            ) from error

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> KernelConnectionInfo:
        """Start the kernel and return its connection info once it listens; may wait in Slurm's queue."""
        try:
            launch = self._launch(cmd, kwargs)
            if self._held is None:
                request = self._request
                own = {_OWN_STATE: {"fields": self._given[1] if self._given else {}}}
                coroutine = self.service.start_kernel(self.kernel_id, request, launch, self._owner, own)
                held, _info = await self._call(coroutine)
                held.on_death, self._held = self._tell_restarter, held
            else:
                await self._call(self._held.restart(launch))
        except asyncio.CancelledError:
            start_cancelled(self.parent)
            raise
        except GatewaySlurmError as error:
            self.log.error("kernel %s was not started: %s", self.kernel_id, printable(error))
            raise
        assert self._held is not None
        self._has_process = True
        self._tell_moved(self._held.process.connection_info())
        return self.connection_info

    def _tell_moved(self, info: dict[str, Any]) -> None:
        """Have this connection info, and the manager no Curve keys where the kernel has none any more."""
        before, self.connection_info = self.connection_info, info  # type: ignore[assignment]
        if "curve_publickey" not in info:
            self._manager.curve_publickey = self._manager.curve_secretkey = None
        self._moved = bool(before) and before != info

    def _launch(self, cmd: list[str], kwargs: dict[str, Any]) -> KernelLaunch:
        service = self.service
        mode, why = self._choose_mode()
        connection = {
            "key": self._session_key().decode(),
            "signature_scheme": self._manager.session.signature_scheme,
            "kernel_name": str(getattr(self.parent, "kernel_name", "") or ""),
            "jupyter_session": kwargs["env"].get("JPY_SESSION_NAME", ""),
        }
        if mode != "ipc":
            connection["curve_publickey"], connection["curve_secretkey"] = self._curve_keys()
        cwd = kwargs.get("cwd")
        return KernelLaunch(
            argv=tuple(cmd),
            env=service.environment_of(self._owner, kwargs["env"]),
            cwd=str(cwd) if cwd else None,
            connection=connection,
            mode=mode,
            why=why,
            language=(self._request.kernel_language or "").lower(),
            start_timeout=service.start_timeout,
            port_range=port_range(service.kernel_ports),
            log_dir=service.log_directory,
        )

    @property
    def _manager(self) -> Any:
        """The KernelManager; a provisioner without one has nobody to give connection info to."""
        if self.parent is None:
            raise KernelStartError("slurm-provisioner needs a KernelManager as its parent")
        return self.parent

    def _session_key(self) -> bytes:
        return bytes(self._manager.session.key)

    def _curve_keys(self) -> tuple[str, str]:
        """The kernel's Curve keys: the manager's where it made some, else ours; the same over restarts."""
        if self._curve is None:
            public, secret = self._manager.curve_publickey, self._manager.curve_secretkey
            if not public or not secret:
                public, secret = zmq.curve_keypair()
            self._curve = public.decode(), secret.decode()
        return self._curve

    def _choose_mode(self) -> tuple[str, str]:
        metadata = dict(getattr(self.kernel_spec, "metadata", None) or {})
        if "supported_encryption" not in metadata and not self._request.kernel_argv:
            metadata = dict(self._wrapped_spec().metadata or {})
        required = getattr(self.parent, "transport_encryption", "disabled") == "required"
        # The kernel manager's manager reads what is kept, if it is ours.
        shows_kept = getattr(getattr(self.parent, "parent", None), "has_frontends", False)
        return choose_mode(
            self._request.connect,
            self.service.connect,
            metadata,
            curve_required=required,
            keeps_output=bool(shows_kept and self.service.kept_output),
        )

    async def until_over(self) -> str:
        """Wait until the kernel is dead and cannot be restarted in its allocation; return why.

        A kernel manager need not wait for it; its restarter, which tries a few times, would know later.
        """
        self._waits_until_over = True
        return "" if self._held is None else await self._call(self._held.until_over())

    def _tell_restarter(self) -> None:
        """The kernel has died: have the restarter know now. Called on the service's loop."""
        held = self._held
        # Who waits until it is over hears then, and why; a restart could only fail before.
        if held is not None and (held.can_restart or not self._waits_until_over) and not held.service.is_closed:
            look_soon(self.parent, lambda: held.process.phase is Phase.DEAD)

    async def post_launch(self, **kwargs: Any) -> None:
        """The manager has taken the kernel over."""
        if self._held is None:
            return
        try:
            await self._call(self._held.taken_over())
        except asyncio.CancelledError:
            # The last moment in which a start can be cancelled: its kernel must not stay.
            start_cancelled(self.parent)
            held, self._held, self._has_process = self._held, None, False
            self.service.submit(held.release())
            raise
        if self._moved:
            self._moved = False
            self.on_moved()

    # -- over server processes ------------------------------------------------------------------

    def remember(self, manager_state: dict[str, Any]) -> None:
        """Have what the kernel manager is to be made of again on record, sealed; any thread, returns at once.

        JSON values only. What was told before and is not told again stays. A kernel that is not there (yet) has
        no record: tell it once the start is done.
        """
        held = self._held
        if held is not None and not held.service.is_closed:
            held.service.submit(_now(held.remember, manager_state))

    def adopt(self, restored: Restored) -> dict[str, Any]:
        """Be the provisioner of a kernel that an earlier server process started, as if this one had.

        Returns the connection info, complete, for ``KernelManager.load_connection_info``; ``restored.record.manager``
        has what was remembered. Any thread; it waits for nothing.
        """
        held, record = restored.held, restored.record
        info = held.process.connection_info()
        self._held, self._has_process = held, True
        held.on_death = self._tell_restarter
        self._owner = record.owner
        self._given = record.owner, dict(record.manager.get(_OWN_STATE, {}).get("fields", {}))
        if "curve_publickey" in info:
            self._curve = info["curve_publickey"], info["curve_secretkey"]
        self.connection_info = info  # type: ignore[assignment]
        return info

    def show_warnings(self, show: Callable[[str], None]) -> None:
        """Give warnings of the kernel's end to ``show``, and write none to its standard error.

        ``show`` gets the text. The service's thread calls it: it must return at once and raise nothing.
        """
        if self._held is not None:
            self._held.process.show_warning = show

    async def until_linked(self, seconds: float) -> None:
        """Wait for the kernel's launcher; raises LinkError when it is out of reach for so long."""
        await self._call(self._held.process.launcher.until_linked(seconds)) if self._held else None

    # -- life ---------------------------------------------------------------------------------

    @property
    def _was_left(self) -> bool:
        """Whether the process ends and the kernel lives on: it is nothing to ask, or to end, any more."""
        return self._held is not None and self._held.service.is_closed and self._held.process.phase is not Phase.DEAD

    @property
    def has_process(self) -> bool:
        return self._has_process

    async def poll(self) -> int | None:
        """None while the kernel lives or nothing is known; reads memory only."""
        if self._held is None or not self._has_process:
            return 0
        return self._held.process.returncode

    async def wait(self) -> int | None:
        if self._held is None or not self._has_process:
            return 0
        returncode = self._held.process.returncode
        if returncode is None and not self._was_left:
            returncode = await self._call(self._held.process.wait())
        self._has_process = False
        return returncode

    async def kept_output(self) -> Kept:
        """What the kernel's node has kept of its output; see ``KernelProcess.read_kept``. Raises LinkError."""
        if self._held is None:
            raise LinkError("there is no kernel whose output could have been kept")
        return await self._call(self._held.process.read_kept())

    def acknowledge(self, msg_id: str, positions: dict[str, str]) -> Future[None] | None:
        """Say what clients have (``KernelProcess.acknowledge``); any thread, does not wait. Done: it is on its way."""
        if self._held is None or self._held.service.is_closed:
            return None
        return self.service.submit(_now(self._held.process.acknowledge, msg_id, positions))

    async def send_signal(self, signum: int) -> None:
        """Signal the kernel's process group; a dead kernel gets none, and that is no error."""
        if self._held is None or not self._has_process or signum == 0 or self._held.process.phase is Phase.DEAD:
            return
        if self._was_left:
            return
        try:
            await self._call(_now(self._held.process.signal, signum))
        except LinkError as error:
            # An interrupt that cannot be delivered is the user's to know; a shutdown goes on without it.
            if not getattr(self.parent, "shutting_down", False):
                raise
            self.log.warning("kernel %s: %s", self.kernel_id, error)

    async def kill(self, restart: bool = False) -> None:
        """SIGKILL, now. A launcher that is out of reach ends its kernels itself when the job ends."""
        await self._end_by(9)

    async def terminate(self, restart: bool = False) -> None:
        """SIGTERM."""
        await self._end_by(15)

    async def _end_by(self, signum: int) -> None:
        try:
            await self.send_signal(signum)
        except LinkError as error:
            self.log.warning("kernel %s: %s", self.kernel_id, error)

    async def shutdown_requested(self, restart: bool = False) -> None:
        """The kernel was asked to shut down: wait a moment here, where its end is told at once.

        Otherwise the manager looks every 100 ms.
        """
        if self._held is None or self._held.process.phase is not Phase.RUNNING or self._was_left:
            return
        try:
            await asyncio.wait_for(self._call(self._held.process.wait()), SHUTDOWN_NOTICE)
        except asyncio.TimeoutError:
            return

    async def cleanup(self, restart: bool = False) -> None:
        """The kernel is over: the last one in an allocation relinquishes it. On a restart it all stays."""
        if restart or self._held is None:
            return
        held, self._held = self._held, None
        self._has_process = False
        # At the process's end the service is closed first, and its kernels with it; ``jupyter run``
        # shuts its kernel down after that.
        if not held.service.is_closed:
            await self._call(held.release())

    async def get_provisioner_info(self) -> dict[str, Any]:
        info = await super().get_provisioner_info()
        if self._held is not None:
            process = self._held.process
            info.update(jobid=self.jobid, node=process.launcher.node, pid=process.pid, connect=self.connect)
        return info


async def _now(function: Any, *arguments: Any) -> None:
    """A plain call, on the service's loop."""
    function(*arguments)
