"""The launcher's main program: the action for each message, Slurm's signals, and the end.

Its command is ``python -I - LAUNCHER_ID ADDRESS[,ADDRESS…] ORPHAN_TIMEOUT ROLE GRES MEMORY``, with this program on
standard input, the launch token in GATEWAY_SLURM_TOKEN, and Slurm's own variables in the environment. ROLE is ``job``
in the job's own script (the job ends with the launcher), ``keep`` in the script of a job that is kept without a server,
``step`` in a job step that overlaps the job, and ``isolated`` in a step with an exact share. GRES and MEMORY are those
of the share as requested, else empty.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gateway_slurm.link import endpoints, wire
from launchers.directories import Directories
from launchers.guard import Guard
from launchers.kernel import Kernel
from launchers.node import (
    OwnLog,
    Walltime,
    end_of,
    find_slurmd,
    is_slurmd,
    pids,
    remove_empty_logs,
    remove_old_logs,
    stat_fields,
)
from launchers.ports import Probes
from launchers.reactor import Backoff, Reactor
from launchers.slurm_variables import KernelEnvironment, nodes_of_job
from launchers.steps import Steps, has_own_nodes, job_is_shared
from launchers.tunnel import Tunnel
from launchers.uplink import Uplink
from launchers.working_directory import home

if TYPE_CHECKING:
    from launchers.journal import Journal

TOKEN_VARIABLE = "GATEWAY_SLURM_TOKEN"  # noqa: S105 - a variable's name, not a token
FIRST_ORPHAN_TIMEOUT = 900.0
# Seconds between SIGTERM and SIGKILL: fewer than the shortest KillWait of sites (slurm.conf(5); default 30 s).
TERM_GRACE = 3.0
# A launcher without a server checks for other steps in its job: seconds between checks, and failed checks in a row.
SHARED_DELAY, MAX_SHARED_DELAY, MAX_FAILED_CHECKS = 3.0, 30.0, 10
# Seconds for which the journal of a kernel stays after STOP: START may follow.
JOURNAL_SECONDS = 60.0
PR_SET_CHILD_SUBREAPER = 36
RELEASED = "released"


class NodeLauncher:
    """The launcher's process: reactions to messages, to signals and to timers."""

    def __init__(
        self, launcher_id: str, addresses: str, orphan_timeout: float, role: str, gres: str, memory: str
    ) -> None:
        self._guard = Guard()
        self._directories = Directories(self._guard.add_directory)
        self._reactor = Reactor()
        self._kernels: dict[str, Kernel] = {}
        self._old: list[Kernel] = []
        self._heartbeat = 10.0
        self._logs: set[str] = set()  # of all kernels so far
        self._log_days = 30.0  # until WELCOME sets it
        self._loopback = "exclusive"  # the same
        self._kept_output = 0  # bytes of each kernel's journal; WELCOME sets it
        self._journals: dict[str, Journal] = {}
        # Until WELCOME: a job whose server never answers must end, even if later orphans have no time limit.
        self._orphan_timeout = orphan_timeout or FIRST_ORPHAN_TIMEOUT
        self._holds_job = role in ("job", "keep")
        self._keep = role == "keep"  # without a server the launcher stays, and the job with it
        self._orphaned = False
        self._next_check = 0.0  # for other steps in the job, by the monotonic clock
        self._check_delay = Backoff(SHARED_DELAY, MAX_SHARED_DELAY)
        self._failed_checks = 0
        self._leaving = False
        self._terminated = False
        self._signalled = False  # Slurm's SIGUSR1 came while there was no link
        self._node = os.environ.get("SLURMD_NODENAME", "")
        self._slurmd = find_slurmd(self._node)
        self._slurmd_missing = False
        self._own_log = OwnLog()
        token = bytes.fromhex(os.environ.pop(TOKEN_VARIABLE))
        os.environ["HOME"] = home(os.environ)
        self._environment = KernelEnvironment(role, gres, memory, lambda: self._directories.for_kernel("share"))
        self._uplink = Uplink(
            self._reactor,
            launcher_id=launcher_id,
            jobid=os.environ.get("SLURM_JOB_ID", ""),
            token=token,
            addresses=[endpoint for endpoint in map(endpoints.parse_endpoint, addresses.split(",")) if endpoint],
            hello=self._hello,
            on_message=self._on_message,
            on_down=self._on_down,
            on_writable=lambda: self._tunnel.read_on(),
        )
        self._walltime = Walltime(self._reactor, send=self._uplink.send, is_linked=lambda: self._uplink.live)
        self._tunnel = Tunnel(self._reactor, self._uplink, self._kernels.get, self._journals.get)
        self._probes = Probes(self._reactor, self._uplink.send)
        self._steps = Steps(self._reactor, os.environ.get("SLURM_JOB_ID", ""), self._uplink.send)

    def run(self) -> None:
        self._own_log.hold()
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        # SIGTERM first: the server must know that the job ends when it hears that a kernel did.
        self._reactor.on_signal(signal.SIGTERM, self._on_sigterm)
        self._reactor.on_signal(signal.SIGCHLD, self._reap)
        for ignored in (signal.SIGINT, signal.SIGHUP):
            self._reactor.on_signal(ignored, lambda: None)
        # The job script ignores SIGUSR1. With a handler here, kernels get the default action after exec.
        self._reactor.on_signal(signal.SIGUSR1, self._on_sigusr1)
        self._uplink.dial()
        self._beat()
        try:
            self._reactor.run()
        finally:
            self._clean_up()

    # -- messages ---------------------------------------------------------------------------

    def _hello(self) -> dict[str, Any]:
        facts = ("SLURMD_NODENAME", "SLURM_STEP_ID", "SLURM_JOB_END_TIME")
        return {
            "hostname": socket.gethostname(),
            "pid": os.getpid(),
            "ip": self._uplink.local_ip(),
            "reads_logs": True,  # and READ_LOG
            "probes": True,  # this launcher understands PROBE
            "dialled": self._uplink.dialled(),
            # Seconds, not moments: this node's clock is only sent for a comparison.
            "age": self._walltime.age,
            "remaining": self._walltime.remaining,
            "clock": time.time(),
            "python": sys.version.split()[0],
            "executable": sys.executable[:500],
            "slurm_job_nodelist": nodes_of_job(os.environ),
            **{name.lower(): os.environ.get(name, "") for name in facts},
        }

    def _on_message(self, name: str, payload: Any) -> None:
        tunnel: dict[str, Callable[[int, bytes], None]] = {
            "OPEN": self._tunnel.open,
            "DATA": self._tunnel.data,
            "CREDIT": self._tunnel.credit,
            "CLOSE": self._tunnel.close,
        }
        if name in tunnel:
            tunnel[name](*payload)
            return
        if name == "ACK":
            if payload["kernel_id"] in self._journals:
                self._journals[payload["kernel_id"]].acknowledge(payload)
            return
        if name in ("SIGNAL", "STDERR_LINE"):
            kernel = self._kernels.get(payload["kernel_id"])
            if kernel is not None:
                kernel.message(name, payload)
            return
        action = {
            "WELCOME": self._welcome,
            "REDIRECT": self._uplink.redirected,
            "READ_LOG": self._read_log,
            "PROBE": lambda fields: self._probes.listen(fields, self._address(fields)),
            "START": self._start,
            "STOP": self._stop,
            "RELEASE": lambda _fields: self._leave(RELEASED),
            "END_TIME": self._walltime.set_end_time,
            "HEARTBEAT": self._on_heartbeat,
            "STEP": self._steps.start,
            "STEP_END": self._steps.end,
            "STEP_ACK": self._steps.acknowledged,
            "LIST_STEPS": self._steps.list_steps,
        }.get(name)
        if action:
            action(payload)

    def _on_down(self) -> None:
        self._tunnel.read_on()
        for journal in self._journals.values():
            journal.moved_on()

    def _welcome(self, fields: dict[str, Any]) -> None:
        if not self._uplink.welcome(fields):
            return
        self._heartbeat = float(fields["heartbeat"])
        self._orphan_timeout = float(fields["orphan_timeout"])
        self._keep, self._orphaned, self._next_check = bool(fields["keep"]), False, 0.0
        same_server = self._tunnel.is_same_server(fields)
        self._kept_output = int(fields.get("kept_output", 0))
        self._log_days = float(fields["log_days"])
        self._loopback = str(fields.get("loopback", "exclusive"))
        streams = self._tunnel.link_up(fields)
        for journal in self._journals.values():
            journal.set_limit(self._kept_output)
        kernels = _shortened([kernel.report() for kernel in self._kernels.values()])
        self._uplink.send("REPORT", kernels=kernels, steps=self._steps.report(), **streams)
        self._next_beat.cancel()  # its interval was not yet the server's
        self._plan_beat()
        self._walltime.link_up(fields, same_server=same_server)
        if self._terminated:
            self._uplink.send("NOTICE", kind="sigterm")
        if self._slurmd_missing:
            self._uplink.send("NOTICE", kind="slurmd", missing=True)
        if self._signalled:
            self._on_sigusr1()

    def _on_heartbeat(self, fields: dict[str, Any]) -> None:
        self._keep = bool(fields.get("keep"))
        self._uplink.learn(fields)

    def _start(self, fields: dict[str, Any]) -> None:
        kernel_id = fields["kernel_id"]
        is_first = not self._kernels
        self._retire(kernel_id)
        kernel = self._kernels[kernel_id] = Kernel(
            self._reactor,
            self._guard,
            make_directory=lambda: self._directories.for_kernel(str(fields["slot"])),
            spec=fields,
            ip=self._address(fields),
            base_env=self._environment.get(),
            send=self._uplink.send,
            make_journal=lambda: self._journal_for(fields),
            may_use_loopback=self._may_use_loopback,
        )
        kernel.start()
        self._logs.add(kernel.log_path)
        if is_first:
            # After the start, so that a slow home does not delay it.
            self._reactor.later(30.0, lambda: remove_old_logs(fields["log_dir"], kernel.log_path, self._log_days))

    def _may_use_loopback(self) -> bool:
        return self._loopback == "always" or has_own_nodes(os.environ.get("SLURM_JOB_ID", ""))

    def _journal_for(self, fields: dict[str, Any]) -> Journal | None:
        """The journal for a new process of the kernel; a direct kernel has none."""
        kernel_id = fields["kernel_id"]
        if fields["mode"] == "direct":
            self._drop_journal(kernel_id)
            return None
        from launchers import readers  # noqa: F401 - loaded now, for the kernel's first clients
        from launchers.journal import Journal

        if kernel_id not in self._journals:
            self._journals[kernel_id] = Journal(self._reactor, self._kept_output, lambda: self._uplink.live)
        journal = self._journals[kernel_id]
        journal.begin(fields["connection"], int(fields.get("journal_from") or 0))
        return journal

    def _drop_journal(self, kernel_id: str) -> None:
        journal = self._journals.pop(kernel_id, None)
        if journal is not None:
            journal.close()

    def _read_log(self, fields: dict[str, Any]) -> None:
        kernel = self._kernels.get(fields["kernel_id"])
        texts = {"kernel": end_of(kernel.log_path) if kernel else "", "launcher": end_of("/proc/self/fd/2")}
        self._uplink.send("LOG", asked=fields["asked"], **texts)

    def _address(self, fields: dict[str, Any]) -> str:
        """The address for a direct kernel: on a restart the same as before, whatever the link's address is now."""
        return str(fields.get("ip") or self._uplink.local_ip())

    def _stop(self, fields: dict[str, Any]) -> None:
        kernel = self._retire(fields["kernel_id"])
        if kernel is not None and kernel.directory:
            shutil.rmtree(kernel.directory, ignore_errors=True)
        kernel_id = fields["kernel_id"]
        if kernel is not None and kernel_id in self._journals:
            self._journals[kernel_id].close_later(JOURNAL_SECONDS, lambda: self._drop_journal(kernel_id))

    def _retire(self, kernel_id: str) -> Kernel | None:
        """Stop the kernel's probe and process; the process ends later."""
        self._probes.close(kernel_id)
        kernel = self._kernels.pop(kernel_id, None)
        if kernel is not None:
            kernel.stop()
            self._old.append(kernel)
        return kernel

    # -- signals and time -------------------------------------------------------------------

    def _reap(self) -> None:
        for kernel in self._all():
            kernel.reaped()
        self._tunnel.close_ended()
        for kernel in [old for old in self._old if not old.runs]:
            kernel.close()
            self._old.remove(kernel)
        self._steps.reaped()
        self._environment.reaped()
        kernels = {kernel.process.pid for kernel in self._all() if kernel.process}
        _reap_orphans(kernels | self._steps.pids() | self._environment.pids() | {self._guard.pid})
        if self._leaving and not self._running():
            self._reactor.stop()

    def _all(self) -> list[Kernel]:
        return [*self._kernels.values(), *self._old]

    def _running(self) -> list[Kernel]:
        return [kernel for kernel in self._all() if kernel.runs]

    def _on_sigterm(self) -> None:
        """Slurm ends the job (scancel, time limit, preemption): end the kernels and tell the server."""
        if not self._terminated:
            self._terminated = True
            self._uplink.send("NOTICE", kind="sigterm")
            self._leave("SIGTERM")

    def _on_sigusr1(self) -> None:
        """Slurm signals that the job's end is near (sbatch(1), --signal): the server asks Slurm for the end time."""
        self._signalled = not self._uplink.live
        self._uplink.send("NOTICE", kind="signal")

    def _leave(self, reason: str) -> None:
        if reason != RELEASED:
            print(f"launcher: exiting: {reason}", file=sys.stderr, flush=True)
        self._leaving = True
        if self._running():
            self._terminate_kernels(lambda: self._reactor.later(1.0, self._reactor.stop))
        else:
            self._reactor.stop()

    def _terminate_kernels(self, then: Callable[[], object]) -> None:
        """Send SIGTERM to all kernels, after TERM_GRACE SIGKILL to those that still run, and then call ``then``."""
        running = self._running()
        for kernel in running:
            kernel.signal(signal.SIGTERM)

        def kill() -> None:
            for kernel in self._running():
                if self._leaving or kernel in running:
                    kernel.stop()
            then()

        self._reactor.later(TERM_GRACE, kill)

    def _beat(self) -> None:
        now = time.monotonic()
        self._look_for_slurmd()
        if self._uplink.live:
            self._uplink.send("HEARTBEAT")
            if now - self._uplink.last_heard > 3 * self._heartbeat:
                self._uplink.drop(f"no message from the server for {now - self._uplink.last_heard:.0f} s")
        elif self._orphan_timeout and now - self._uplink.last_live > self._orphan_timeout and not self._stays(now):
            self._leave(f"no server for {self._orphan_timeout:g} s")
            return
        self._plan_beat()

    def _stays(self, now: float) -> bool:
        """Whether the launcher stays without a server. Its kernels end, because no client reaches them."""
        if not self._orphaned:
            self._orphaned = True
            self._terminate_kernels(lambda: None)
            if self._keep:
                reason = f"no server for {self._orphan_timeout:g} s"
                print(f"launcher: {reason}; the job is kept", file=sys.stderr, flush=True)
        return self._keep or (self._holds_job and self._job_is_shared(now))

    def _job_is_shared(self, now: float) -> bool:
        """Ask Slurm at growing intervals; True also while a few checks in a row get no answer."""
        if now < self._next_check:
            return True
        self._next_check = now + self._check_delay.next()
        shared = job_is_shared(os.environ.get("SLURM_JOB_ID", ""))
        self._failed_checks = self._failed_checks + 1 if shared is None else 0
        if shared:
            print("launcher: there is no server, but other steps run in the job", file=sys.stderr, flush=True)
        return bool(shared) or 0 < self._failed_checks < MAX_FAILED_CHECKS

    def _look_for_slurmd(self) -> None:
        """Report when this node's slurmd is gone, and when it is back."""
        if self._slurmd is None or is_slurmd(self._slurmd):
            return
        other = find_slurmd(self._node)
        self._slurmd = other or self._slurmd
        if (other is None) != self._slurmd_missing:
            self._slurmd_missing = other is None
            self._uplink.send("NOTICE", kind="slurmd", missing=self._slurmd_missing)

    def _plan_beat(self) -> None:
        self._next_beat = self._reactor.later(min(self._heartbeat, 10.0), self._beat)

    def _clean_up(self) -> None:
        for kernel in self._running():
            kernel.stop()
        self._uplink.finish(1.0)
        _kill_children(except_pid=self._guard.pid)
        self._directories.close()
        self._guard.close()
        remove_empty_logs(self._logs)
        self._own_log.remove_if_empty(alone=self._holds_job)


def _shortened(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What REPORT says of the kernels, without their last output where that would be too much for one message."""
    if len(json.dumps(reports)) < wire.MAX_REPORT // 2:
        return reports
    return [{name: value for name, value in report.items() if name != "output_tail"} for report in reports]


def _reap_orphans(known: set[int]) -> None:
    """Collect ended processes that kernels left behind; the children in ``known`` are collected elsewhere."""
    while True:
        try:
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if found is None or found.si_pid in known:
            return
        os.waitpid(found.si_pid, 0)


def _kill_children(except_pid: int) -> None:
    """Kill the processes that kernels left behind: the launcher is their parent (prctl(2), PR_SET_CHILD_SUBREAPER)."""
    for pid in pids():
        with contextlib.suppress(OSError):  # the process has ended
            if pid != except_pid and int(stat_fields(pid)[1]) == os.getpid():
                os.kill(pid, signal.SIGKILL)


class _Log:
    """Standard error, which is the launcher's log: a full disk or quota ends the log, and not the launcher."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            os.write(2, text.encode(errors="backslashreplace"))
        return len(text)

    def flush(self) -> None:
        """There is no buffer."""


def main() -> None:
    """Run the launcher until it is released, orphaned or ended by Slurm."""
    sys.stderr = _Log()
    launcher_id, addresses, orphan_timeout, role, gres, memory = sys.argv[1:7]
    NodeLauncher(launcher_id, addresses, float(orphan_timeout), role, gres, memory).run()
