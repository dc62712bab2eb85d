"""The process proxy: the server's handle on one kernel process.

It lives on the service's loop. ``returncode`` and ``phase`` are plain attributes that any thread may read: a poll
reads memory only.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from gateway_slurm._util import RatedLog, printable
from gateway_slurm.allocations.launcher import Launcher
from gateway_slurm.errors import (
    GatewaySlurmError,
    KernelStartError,
    LauncherFailed,
    LinkError,
    NoGreeting,
    NotEncrypted,
    StartTimeout,
)
from gateway_slurm.kernels.model import TRANSITIONS, KernelLaunch, Phase
from gateway_slurm.kernels.transport import TransportSelector, checked_ports
from gateway_slurm.link import wire
from gateway_slurm.link.journal import JournalReading
from gateway_slurm.link.tunnel import KernelTunnel
from gateway_slurm.slurm.names import kernel_log
from gateway_slurm.store.records import KernelRecord

MAX_TEXT = 4096
"""Characters of a kernel's command line in a message."""
REPLY_SLACK = 15.0
"""Seconds by which the server's deadline for a start is later than the launcher's own."""
JOB_END_SECONDS = 0.2
"""Seconds after a kernel's EXIT in which its launcher reports, or shows by its own end, that Slurm ends the job."""
_JOB_END_CODES = {code for signum in (signal.SIGTERM, signal.SIGKILL) for code in (-signum, 128 + signum)}
"""How a kernel ends whose job Slurm ends: scancel(1) and slurm.conf(5), KillWait; 128 and more behind a shell."""
START_ERRORS: dict[str, type[KernelStartError]] = {
    "timeout": StartTimeout,
    "plain": NotEncrypted,
    "no_greeting": NoGreeting,
}
"""The error for each kind of FAILED; for other kinds KernelStartError."""


class KernelProcess:
    """One kernel: start, signal, wait, stop. Its launcher outlives it.

    ``tunnel_prefix`` begins the paths of the Unix sockets on which the tunnel listens on this machine.
    """

    def __init__(
        self,
        kernel_id: str,
        launcher: Launcher,
        *,
        tunnel_prefix: str,
        transport: TransportSelector,
        log: logging.Logger,
    ) -> None:
        self.kernel_id = kernel_id
        self.launcher = launcher
        self.log = RatedLog(log)
        self.phase = Phase.NEW
        self.returncode: int | None = None
        # Why the kernel ended, in words: the signal or exit code, and what Slurm says of the job.
        self.reason = ""
        self.brief = ""  # the same without its command line and output, for logs
        self.output_tail = ""
        self.pid = 0
        self.directory, self.directory_why = "", ""  # where it started, and why there; see launchers.working_directory
        self.ip = ""
        self.ports: dict[str, int] = {}
        self.generation = 0
        self.mode = ""  # as the kernel listens: direct | ipc | tcp
        self.started_at: float | None = None  # seconds since the epoch
        self._tunnel_prefix, self._transport = tunnel_prefix, transport
        self._tunnel: KernelTunnel | None = None
        self._fallback_reason = ""  # why a direct kernel is reached through the tunnel, where it is
        self._started: asyncio.Future[dict[str, Any]] | None = None
        self._exit: tuple[int, str] = (-signal.SIGKILL, "")  # EXIT's code, and the code in words
        self._exit_timer: asyncio.TimerHandle | None = None
        self._waited_for_job = False  # JOB_END_SECONDS have passed since EXIT
        self._end_requested = False  # this server ended the process
        self._ended_with_job = False
        self._dead = asyncio.Event()
        self.on_exit: Callable[[KernelProcess], None] = lambda _kernel: None
        self.walltime_end: float | None = None
        # Shows a warning to the kernel's users, on the service's loop, without waiting. None: the launcher shows it.
        self.show_warning: Callable[[str], None] | None = None
        self._directory_note = ""  # the last one that was logged
        self.launched: KernelLaunch | None = None
        # The positions and notes of all acknowledgements; they are sent again on a new link.
        self._positions: dict[str, int] | None = None
        self._notes = wire.Notes()
        self._journal_lock = threading.Lock()
        self._delivered = 0  # the highest number in the journal that a reading has delivered
        launcher.kernels[kernel_id] = self

    def _enter(self, phase: Phase) -> None:
        if phase not in TRANSITIONS[self.phase]:
            raise AssertionError(f"kernel {self.kernel_id}: {self.phase.value} cannot become {phase.value}")
        self.phase = phase

    # -- Start ------------------------------------------------------------------------------

    async def start(self, launch: KernelLaunch) -> None:
        """Start the kernel, for the first time or again, and return once it listens.

        Raises KernelStartError when the kernel does not come up, LinkError when the launcher has no link. A start that
        fails or is cancelled leaves no process.
        """
        self._enter(Phase.STARTING)
        self.generation += 1
        self.returncode, self.reason, self.output_tail = None, "", ""
        self._waited_for_job = self._end_requested = self._ended_with_job = False
        self._dead.clear()
        self._started = asyncio.get_running_loop().create_future()
        try:
            selected = await self._select(launch)
            try:
                self._set_endpoint(await self._launch(selected))
            except (NotEncrypted, NoGreeting) as error:
                self.log.warning("kernel %s: %s", self.kernel_id, printable(error))
                self._set_endpoint(await self._launch_tunnelled(launch, error))
        except BaseException as error:
            self.stop()
            if self.phase is not Phase.DEAD:
                self._end(1, f"its start failed: {error or type(error).__name__}")
            raise
        self.started_at = time.time()
        self._note_directory()
        if self.mode == "tcp":
            self.log.warning(
                "kernel %s cannot use Unix sockets: on its node it listens on loopback TCP, "
                "where other users of the node can read what it publishes",
                self.kernel_id,
            )

    async def _select(self, launch: KernelLaunch) -> KernelLaunch:
        """Select how clients reach the kernel; a direct kernel has its ``ip`` and ``ports`` then."""
        previous = self.ip, self.ports
        selected = await self._transport.select(launch, self.launcher, self.kernel_id, self.launched, previous)
        self.launched = selected.launch
        if selected.launch.mode == "direct":
            self.ip, self.ports = selected.ip, selected.ports or {}
            self._close_tunnel()
        return selected.launch

    async def _launch_tunnelled(self, launch: KernelLaunch, error: NotEncrypted | NoGreeting) -> dict[str, Any]:
        """Start the kernel again through the tunnel: its kernelspec declares CurveZMQ, and it did not show that.

        Raises ``error``, with what to do, where the request must be direct.
        """
        unanswered = isinstance(error, NoGreeting)
        if launch.mode == "direct" and unanswered:
            raise NoGreeting(
                f"connect = direct, but {error.brief}: the node may be overloaded or have been suspended. Try again, "
                "or use connect = auto or tunnel"
            )
        if launch.mode == "direct":
            raise NotEncrypted(
                "connect = direct, but the kernel listened without encryption although its kernelspec declares "
                "CurveZMQ (metadata.supported_encryption); it was ended. Install a kernel that supports it "
                "(ipykernel >= 7.4 does), or use connect = tunnel and correct the kernelspec"
            )
        self.generation += 1
        self._started = asyncio.get_running_loop().create_future()
        self.launched = launch.tunnelled(
            "the kernel did not answer the check of its encryption in time"
            if unanswered
            else "the kernel listened without encryption, although its kernelspec declares CurveZMQ "
            "(supported_encryption)"
        )
        return await self._launch(self.launched)

    def _set_endpoint(self, report: dict[str, Any]) -> None:
        """Take from STARTED where the kernel listens. Clients will connect there.

        Raises LinkError where the launcher reports another mode or address than it was given.
        """
        assert self.launched is not None
        mode, expected = report.get("mode", ""), self.launched.mode
        if mode not in (("direct",) if expected == "direct" else ("ipc", "tcp")):
            raise LinkError(f"{self.launcher.where} reports mode {mode!r} for a kernel to start as {expected}")
        if expected == "direct":
            if report.get("ip") != self.ip:
                raise LinkError(
                    f"{self.launcher.where} reports that the kernel listens at {report.get('ip', '')[:60]!r}, "
                    f"which is not the node's address {self.ip}"
                )
            self.ports = checked_ports(report.get("ports"), self.launched.port_range)
        else:
            self.ip, self.ports = report.get("ip", ""), dict(report.get("ports", {}))
        self.mode, self.pid = mode, report.get("pid", 0)
        self.directory = printable(report.get("directory", ""))
        self.directory_why = printable(report.get("directory_why", ""))

    @property
    def connect(self) -> dict[str, str] | None:
        """How clients reach the kernel, as the setting ``connect`` names it, and why; any thread may read it."""
        launched = self.launched
        if launched is None:
            return None
        direct = launched.mode == "direct" and not self._fallback_reason
        return {"mode": "direct" if direct else "tunnel", "why": self._fallback_reason or launched.why}

    def _endpoint(self) -> dict[str, Any]:
        """Where clients reach the kernel, as fields of a connection file."""
        if self.mode == "direct" and not self._fallback_reason:
            return {"transport": "tcp", "ip": self.ip, **_port_fields(self.ports)}
        assert self._tunnel is not None
        return {"transport": "ipc", "ip": self._tunnel.prefix, **_port_fields(self._tunnel.ports)}

    async def _launch(self, launch: KernelLaunch) -> dict[str, Any]:
        assert self._started is not None
        if self._started.done():  # the job ended meanwhile
            return self._started.result()
        if launch.mode == "ipc":
            self._tunnel = self._tunnel or self._make_tunnel()
            await self._tunnel.listen()
        sent = self.launcher.send(
            "START",
            kernel_id=self.kernel_id,
            slot=self.launcher.slot_of(self.kernel_id),
            generation=self.generation,
            argv=launch.argv,
            env=launch.env,
            cwd=launch.cwd,
            directory=launch.directory,
            default_directory=launch.default_directory,
            connection=launch.connection,
            mode=launch.mode,
            language=launch.language,
            ip=self.ip if launch.mode == "direct" else None,
            ports=(self.ports or None) if launch.mode == "direct" else None,
            port_range=launch.port_range,
            start_timeout=launch.start_timeout,
            log_dir=launch.log_dir,
            log_name=kernel_log(self.launcher.jobid, self.kernel_id, launch.connection.get("jupyter_session", "")),
            umask=launch.umask,
            journal_from=self._delivered + 1,
        )
        if not sent:
            raise LinkError(f"the link to {self.launcher.where} is down: the kernel cannot be started now")
        # The launcher enforces the deadline; the server's covers a launcher that does not answer at all.
        seconds = launch.start_timeout + REPLY_SLACK
        try:
            return await asyncio.wait_for(self._started, seconds)
        except asyncio.TimeoutError as error:
            raise StartTimeout(
                f"{self.launcher.where} did not report within {seconds:g} s whether the kernel started"
            ) from error

    def _make_tunnel(self) -> KernelTunnel:
        return KernelTunnel(self.launcher.streams, self.kernel_id, self._tunnel_prefix)

    # -- Kernels of an earlier server process -----------------------------------------------

    def restore(self, record: KernelRecord, fallback_reason: str = "") -> None:
        """Become the kernel on record: LOST until its launcher reports it.

        ``fallback_reason`` says why this server cannot dial the node of a direct kernel. Raises TypeError or KeyError
        where the record is incomplete, and changes nothing then.
        """
        launched = KernelLaunch.from_json(record.launch)
        self._enter(Phase.LOST)
        self.launched, self.generation, self.mode = launched, record.generation, record.mode
        self.pid, self.ip, self.ports = record.pid, record.ip, dict(record.ports)
        self.started_at = record.started_at
        self._fallback_reason = fallback_reason if self.mode == "direct" else ""
        if self.mode != "direct" or self._fallback_reason:
            self._tunnel = self._make_tunnel()

    async def reopen(self) -> None:
        """Open the tunnel's sockets again; ZeroMQ clients retry until then."""
        if self._tunnel is not None:
            await self._tunnel.listen()

    def connection_info(self) -> dict[str, Any]:
        """All that a client needs, secrets included; ``key`` is bytes, as jupyter_client expects."""
        assert self.launched is not None
        given = self.launched.connection
        info = {**self._endpoint(), "key": given["key"].encode(), "signature_scheme": given["signature_scheme"]}
        if self.mode == "direct":
            info.update({name: given[name] for name in ("curve_publickey", "curve_secretkey") if name in given})
        return info

    # -- Messages from the launcher ---------------------------------------------------------

    def message(self, name: str, fields: dict[str, Any]) -> None:
        """Take STARTED, FAILED or EXIT, within ``link.bounds``; a message about an earlier start is ignored."""
        if fields.get("generation") != self.generation or self.phase is Phase.DEAD:
            return
        if name == "STARTED" and self.phase is Phase.LOST:
            # The restart that an earlier server began is complete.
            try:
                self._set_endpoint(fields)
            except LinkError as error:  # its clients would look for it elsewhere: the user must restart it
                self.stop()
                self._end(1, str(error))
                return
            self._enter(Phase.RUNNING)
        elif name == "STARTED" and self.phase is Phase.STARTING:
            self._enter(Phase.RUNNING)
            if self._started is not None and not self._started.done():
                self._started.set_result(fields)
        elif name == "FAILED":
            self._fail(fields)
        elif name == "EXIT":
            self.output_tail = fields.get("output_tail", "")
            code = fields.get("returncode", 1)
            memory = f": {self.launcher.memory_words}" if fields.get("oom") else ""
            self._exit = code, wire.describe_exit(code) + memory
            if self.phase in (Phase.RUNNING, Phase.LOST):
                self._enter(Phase.EXITED)
            if self.phase is Phase.EXITED:
                self._decide_death()
            else:
                self._end(*self._exit)

    def _decide_death(self) -> None:
        """Declare an exited kernel dead once it is known whether its job ends, too; called with each new fact.

        Slurm signals a job's processes in any order, so EXIT may come before or after the launcher's notice, or before
        the link breaks. No other place distinguishes a crash, after which a restart can help, from the job's end.
        """
        if self.phase is not Phase.EXITED:
            return
        if self.launcher.terminated:
            self._end(self._exit[0], f"Slurm is ending job {self.launcher.jobid}", with_job=True)
        elif self.launcher.link is None:
            return  # Slurm, or the launcher over its next link, reports what happened
        elif self._exit[0] not in _JOB_END_CODES or self._end_requested or self._waited_for_job:
            self._end(*self._exit)
        elif self._exit_timer is None:
            self._exit_timer = asyncio.get_running_loop().call_later(JOB_END_SECONDS, self._stop_waiting)

    def _stop_waiting(self) -> None:
        self._exit_timer, self._waited_for_job = None, True
        self._decide_death()

    def _fail(self, fields: dict[str, Any]) -> None:
        self.output_tail = fields.get("output_tail", "")
        cause, argv = fields.get("message", "the launcher gives no reason"), str(fields.get("argv"))[:MAX_TEXT]
        brief = f"{cause} (node {self.launcher.node}, job {self.launcher.jobid})"
        message = f"{brief[:-1]}, argv {argv})"
        if self.output_tail:
            message += f"; the last lines of its output:\n{self.output_tail}"
        if self.phase is Phase.LOST:
            self._end(1, message, brief)
            return
        error_type = START_ERRORS.get(fields.get("kind", ""), KernelStartError)
        self.fail_start(error_type(message, output_tail=self.output_tail, brief=brief))

    def fail_start(self, error: GatewaySlurmError) -> None:
        """The start that is under way has failed."""
        if self._started is not None and not self._started.done():
            self._started.set_exception(error)
            self._started.exception()  # retrieved: asyncio logs an exception that is not

    def reported(self, fields: dict[str, Any]) -> None:
        """Take the kernel's part of REPORT on a new link: what happened while there was no link."""
        if self.phase is Phase.LOST and fields["generation"] > self.generation:
            # An earlier server restarted the kernel, and died before it recorded that.
            self.generation = fields["generation"]
        if fields.get("generation") != self.generation:
            return
        if self._positions is not None:
            self._send_acknowledged(self._notes.texts)  # the last one may have been lost with the link
        message = {"exited": "EXIT", "failed": "FAILED", "running": "STARTED"}.get(fields["state"])
        if message:
            self.message(message, fields)

    def unreported(self) -> None:
        """REPORT on a new link does not name this kernel."""
        if self.phase in (Phase.LOST, Phase.EXITED):
            self.ended_with_job("its launcher no longer knows it")

    def lost(self) -> None:
        """The launcher's link broke; the kernel may live on."""
        if self.phase is Phase.RUNNING:
            self._enter(Phase.LOST)

    def job_ends(self) -> None:
        """Slurm is ending the job; the kernel may live for some seconds more."""
        self._decide_death()

    def ended_with_job(self, reason: str) -> None:
        """The allocation or the launcher is over, and the kernel with it."""
        if self.phase in (Phase.STARTING, Phase.NEW):
            self.fail_start(LauncherFailed(reason))
        elif self.phase is not Phase.DEAD:
            self._end(self._exit[0] if self.phase is Phase.EXITED else -signal.SIGKILL, reason, with_job=True)
        elif reason not in self.reason:
            # Slurm's own word replaces what the launcher knew; a crash before it remains the reason.
            if self._ended_with_job:
                self.reason = self.brief = reason
            else:
                self.reason = f"{self.reason}; {reason}"
            self.log.warning("kernel %s ended: %s", self.kernel_id, printable(reason))

    def _end(self, returncode: int, reason: str, brief: str = "", *, with_job: bool = False) -> None:
        self.fail_start(KernelStartError(f"the kernel ended at start: {reason}", output_tail=self.output_tail))
        self._enter(Phase.DEAD)
        self._cancel_exit_timer()
        self.reason, self.brief, self._ended_with_job = reason, brief or reason, with_job
        self.returncode = returncode
        self._dead.set()
        self.log.debug("kernel %s (job %s) ended: %s", self.kernel_id, self.launcher.jobid, printable(reason))
        self.on_exit(self)

    # -- Warnings ---------------------------------------------------------------------------

    def warn(self, text: str) -> None:
        """Log a warning and show it to the kernel's users under the running cell.

        The gateway, or a Jupyter server with its kernel manager, sends its frontends a message (``show_warning``).
        Under any other server the launcher writes a line to the kernel's standard error, which ipykernel captures; a
        kernel that captures nothing shows none. Returns at once and raises nothing.
        """
        self.log.warning("kernel %s: %s", self.kernel_id, text)
        # The output of the cell may lack a line end, as that of a progress bar does.
        line = f"\n{text}\n"
        if self.show_warning is not None:
            self.show_warning(line)
        elif self.phase is Phase.RUNNING:
            self.launcher.send("STDERR_LINE", kernel_id=self.kernel_id, line=line)

    @property
    def directory_note(self) -> str:
        """What users must know about where the kernel started; "" where it is the wanted directory."""
        if not self.directory_why:
            return ""
        return f"gateway_slurm: the kernel's working directory is {self.directory}, since {self.directory_why}"

    def _note_directory(self) -> None:
        """Log where the kernel started; a restart with the same result says nothing.

        Before the first cell a line on the kernel's standard error would be shown nowhere.
        """
        note = self.directory_note
        if note and note != self._directory_note:
            self.log.warning("kernel %s: %s", self.kernel_id, note)
        self._directory_note = note

    # -- The journal ------------------------------------------------------------------------

    @property
    def has_journal(self) -> bool:
        """Whether the kernel's launcher keeps a journal of its output; any thread may read it."""
        return self.launched is not None and self.launched.mode != "direct"

    def read_journal(self, start: int | None, upto: int, **counted: Any) -> JournalReading:
        """A reading for the caller's loop, which ``attach`` opens on the service's; see ``JournalReading``."""
        return JournalReading(self.kernel_id, start=start, upto=upto, delivered=self.has_delivered, **counted)

    def has_delivered(self, number: int) -> None:
        """A reading has delivered messages up to this number; any thread calls it."""
        with self._journal_lock:
            self._delivered = max(self._delivered, number)

    def acknowledge(self, positions: dict[str, int], notes: dict[str, str | None]) -> None:
        """Have the launcher keep these for the next server: ``positions`` in place of the last ones, changed ``notes``.

        A note is None where it is removed. Without a link they are sent on the next one.
        """
        self._positions = positions
        self._send_acknowledged(self._notes.change(notes))

    def _send_acknowledged(self, notes: Mapping[str, str | None]) -> None:
        self.launcher.send("ACK", kernel_id=self.kernel_id, positions=self._positions, notes=notes)

    # -- Control ----------------------------------------------------------------------------

    async def wait(self) -> int:
        """Wait for the kernel's end; return the exit code or minus the signal."""
        await self._dead.wait()
        assert self.returncode is not None
        return self.returncode

    def signal(self, signum: int) -> None:
        """Signal the kernel's process group. Raises LinkError when the launcher has no link."""
        if self.phase is Phase.DEAD:
            return
        self._end_requested = self._end_requested or signum in (signal.SIGTERM, signal.SIGKILL)
        if not self.launcher.send("SIGNAL", kernel_id=self.kernel_id, signum=int(signum)):
            raise LinkError(f"the link to {self.launcher.where} is down: signal {signum} could not be sent")

    def stop(self) -> None:
        """Have the launcher kill the kernel's processes and remove its files; the launcher stays."""
        self._end_requested = True
        self.launcher.send("STOP", kernel_id=self.kernel_id)

    def close(self) -> None:
        """End the kernel for good, and close its tunnel."""
        self.stop()
        if self.phase is not Phase.DEAD:
            self._end(-signal.SIGKILL, "stopped")
        self.detach()

    def hand_over(self, reason: str) -> None:
        """Another server has the kernel now, and it is over for this one; ``on_exit`` is not called."""
        self.on_exit = lambda _kernel: None
        if self.phase is not Phase.DEAD:
            self._end(-signal.SIGKILL, reason)
        self.detach()

    def detach(self) -> None:
        """Close the tunnel and forget the kernel; the launcher gets no message, and the kernel runs on."""
        self._close_tunnel()
        self._cancel_exit_timer()
        self.launcher.kernels.pop(self.kernel_id, None)

    def _cancel_exit_timer(self) -> None:
        if self._exit_timer is not None:
            self._exit_timer.cancel()
            self._exit_timer = None

    def _close_tunnel(self) -> None:
        self._fallback_reason = ""
        if self._tunnel is not None:
            self._tunnel.close()
            self._tunnel = None


def _port_fields(ports: dict[str, int]) -> dict[str, int]:
    return {f"{channel}_port": port for channel, port in ports.items()}
