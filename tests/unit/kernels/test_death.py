"""Whether a kernel crashed or its job ends: decided in one place, in whatever order the facts arrive."""

from __future__ import annotations

import asyncio
import logging
import signal
from types import SimpleNamespace

import pytest

from gateway_slurm.allocations.launcher import Launcher, LauncherEvents
from gateway_slurm.allocations.model import Allocation, Place
from gateway_slurm.environment import DEFAULT_UMASK
from gateway_slurm.errors import AllocationEnded
from gateway_slurm.kernels import process as kernel_process
from gateway_slurm.kernels.held import KernelHandle
from gateway_slurm.kernels.model import KernelLaunch, Phase
from gateway_slurm.kernels.process import KernelProcess
from gateway_slurm.kernels.transport import TransportSelector
from gateway_slurm.request import KernelRequest
from helpers.raw_links import launcher_settings

LOG = logging.getLogger("test.death")
EVENTS = LauncherEvents(linked=lambda: None, link_lost=lambda _reason: None, end_reported=lambda *_a, **_k: None)
SLURM = "job 7 ended: CANCELLED"


class SilentLink:
    """A link that takes every message."""

    peer = ""

    def send(self, _name, **_fields):
        """Take a message."""


class Death:
    """A running kernel, and what happens to it: each method is one fact that reaches the server."""

    def __init__(self):
        self.launcher = Launcher(
            "gs-a",
            Allocation(ours=True, request=KernelRequest()),
            launcher_settings(),
            addresses=list,
            events=EVENTS,
            log=LOG,
        )
        self.launcher.jobid = "7"
        self.link = self.launcher.link = SilentLink()
        self.kernel = KernelProcess(
            "k", self.launcher, tunnel_prefix="/nonexistent/t", transport=TransportSelector(LOG), log=LOG
        )
        self.kernel.phase, self.kernel.generation = Phase.RUNNING, 1

    def exit(self, code):
        """EXIT: the kernel's process has ended."""
        self.launcher.link_message(
            self.link, "EXIT", {"kernel_id": "k", "generation": 1, "returncode": code, "output_tail": ""}
        )

    def notice(self):
        """NOTICE: Slurm sent the launcher SIGTERM."""
        self.launcher.link_message(self.link, "NOTICE", {"kind": "sigterm"})

    def link_lost(self):
        """The link breaks."""
        self.launcher.link_down(self.link, "the test cuts it")

    def link_back(self, code):
        """The launcher dials again, and reports that the kernel has ended."""
        self.launcher.link = self.link
        self.launcher._reported(
            {"kernels": [{"kernel_id": "k", "generation": 1, "state": "exited", "returncode": code}]}
        )

    def slurm(self):
        """Slurm says that the job is over."""
        self.launcher.end(SLURM)

    def stop(self):
        """The server stops the kernel."""
        self.kernel.stop()

    @property
    def outcome(self):
        """Dead or not, the exit code, whether a restart can help, and the reason."""
        kernel = self.kernel
        if kernel.phase is not Phase.DEAD:
            return None
        return kernel.returncode, self.launcher.terminated or self.launcher.ended, kernel.reason


TERM, KILL, SEGV = -signal.SIGTERM, -signal.SIGKILL, -signal.SIGSEGV
ENDING = "Slurm is ending job 7"
# What happens, in order ("later": JOB_END_SECONDS pass), and what is known after the last of it.
CASES = {
    "a crash is known at once": ([("exit", SEGV)], (SEGV, False, "signal 11 (SIGSEGV)")),
    "an exit is known at once": ([("exit", 0)], (0, False, "exit code 0")),
    "what this server stops is known at once": ([("stop",), ("exit", KILL)], (KILL, False, "signal 9 (SIGKILL)")),
    "a killed kernel may be the job's end": ([("exit", KILL)], None),
    "so may one that is terminated": ([("exit", TERM)], None),
    "so may one behind a shell": ([("exit", 143)], None),
    "a killed kernel whose launcher lives crashed": ([("exit", KILL), ("later",)], (KILL, False, "signal 9 (SIGKILL)")),
    "EXIT before NOTICE": ([("exit", TERM), ("notice",)], (TERM, True, ENDING)),
    "NOTICE before EXIT": ([("notice",), ("exit", TERM)], (TERM, True, ENDING)),
    "the kernel outlives NOTICE": ([("notice",)], None),
    "a kernel exits by itself on SIGTERM": ([("notice",), ("exit", 0)], (0, True, ENDING)),
    "NOTICE, then the link, then Slurm": ([("notice",), ("link_lost",), ("slurm",)], (KILL, True, SLURM)),
    "NOTICE, EXIT, then Slurm": ([("notice",), ("exit", TERM), ("link_lost",), ("slurm",)], (TERM, True, SLURM)),
    "EXIT before the link is lost": ([("exit", KILL), ("link_lost",), ("later",)], None),
    "EXIT, the link, then Slurm": ([("exit", KILL), ("link_lost",), ("later",), ("slurm",)], (KILL, True, SLURM)),
    "the link is lost first": ([("link_lost",), ("slurm",)], (KILL, True, SLURM)),
    "the link comes back after a crash": (
        [("link_lost",), ("link_back", KILL), ("later",)],
        (KILL, False, "signal 9 (SIGKILL)"),
    ),
    "EXIT, and the link only broke": (
        [("exit", KILL), ("link_lost",), ("later",), ("link_back", KILL)],
        (KILL, False, "signal 9 (SIGKILL)"),
    ),
    "a crash, and then the job's end": ([("exit", SEGV), ("slurm",)], (SEGV, True, f"signal 11 (SIGSEGV); {SLURM}")),
}


@pytest.mark.parametrize("case", CASES)
async def test_a_death_is_a_crash_or_the_jobs_end_in_any_order_of_the_facts(case, monkeypatch):
    """A restart is tried only after a crash, and a kernel counts as alive until the difference is known."""
    monkeypatch.setattr(kernel_process, "JOB_END_SECONDS", 0.01)
    events, outcome = CASES[case]
    death, ends = Death(), []
    death.kernel.on_exit = ends.append
    for name, *arguments in events:
        if name == "later":
            await asyncio.sleep(0.03)
        else:
            getattr(death, name)(*arguments)
    assert death.outcome == outcome
    assert len(ends) == (outcome is not None)
    death.kernel.detach()


RECORDED = {
    "argv": ["kernel"],
    "env": {},
    "cwd": None,
    "connection": {},
    "mode": "ipc",
    "language": "python",
    "start_timeout": 5.0,
    "port_range": None,
    "log_dir": "",
}


def test_a_launch_on_record_from_the_previous_version_is_read():
    """It has no umask; its kernel was started with the usual one, and is restored in a rolling upgrade."""
    assert KernelLaunch.from_json(RECORDED).umask == DEFAULT_UMASK
    assert KernelLaunch.from_json({**RECORDED, "umask": 0o007}).umask == 0o007


@pytest.mark.parametrize("crashed", [True, False], ids=["after a crash", "while it runs"])
async def test_a_kernel_ends_in_one_event_however_often_its_restart_fails(crashed):
    """A crash is that event; of a kernel that runs, the restart that stops it and fails."""
    death, emitted = Death(), []
    kernels = SimpleNamespace(
        log=LOG, release_grace=60, events=SimpleNamespace(emit=lambda kind, **_fields: emitted.append(kind))
    )
    place = Place("k", "n1", death.launcher)
    handle = KernelHandle(kernels, death.kernel, Allocation(ours=True, request=KernelRequest()), place)
    death.kernel.started_at = 1.0
    death.launcher._is_up.set()

    def take(name, **_fields):
        """Slurm ends the job while the kernel stops."""
        if name == "STOP":
            death.notice()
            death.exit(KILL)

    death.link.send = take
    if crashed:
        death.exit(SEGV)
        death.notice()
    for _click in range(3):
        with pytest.raises(AllocationEnded):
            await handle.restart(KernelLaunch.from_json(RECORDED))
    handle.cancel_timer()
    assert emitted == ["kernel_ended"]
