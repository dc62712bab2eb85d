"""What users, jobs and kernels say stands in logs and on terminals as text, and as nothing else."""

from __future__ import annotations

import asyncio
import io
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_slurm._util import in_one_line, printable
from gateway_slurm.allocations.launcher import Launcher
from gateway_slurm.allocations.model import Allocation
from gateway_slurm.allocations.recovery import Orphan, cancel_orphan
from gateway_slurm.cli import app
from gateway_slurm.cli.doctor.findings import Doctor, Finding, _print
from gateway_slurm.errors import GatewaySlurmError, KernelStartError
from gateway_slurm.kernels.model import Phase
from gateway_slurm.kernels.process import MAX_TEXT, KernelProcess
from gateway_slurm.kernels.transport import TransportSelector
from gateway_slurm.link import bounds, wire
from gateway_slurm.request import KernelRequest
from gateway_slurm.slurm.model import JobInfo, StepInfo
from helpers.raw_links import launcher_settings

FORGED = "died\n[W 2030-01-01 SlurmGatewayApp] token accepted for admin\r\n\x1b]0;owned\x07\x9b2J\u202egnp.exe"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, größer, 漢字\t|", "plain, größer, 漢字\t|"),
        ("a\nb\r\nc", "a\n    b\n    c"),
        ("a\rb", r"a\rb"),
        ("\x1b[2J\x9b2J\x7f\0", r"\x1b[2J\x9b2J\x7f\x00"),
        ("\u202egpj.exe\u2066\u200f", r"\u202egpj.exe\u2066\u200f"),
        ("a\u2028b\x85c\x0bd", r"a\u2028b\x85c\x0bd"),
        ("\udc80\U000e0041", r"\udc80\U000e0041"),
        (ValueError("a\nb"), "a\n    b"),
    ],
    ids=ascii,
)
def test_what_a_terminal_would_obey_is_shown_as_an_escape(text, shown):
    """Text in any script stays as it is."""
    assert printable(text) == shown


@given(st.text())
def test_no_text_begins_a_line_of_its_own(text):
    """And all of it can be printed, also by who takes other ends of lines for one."""
    first, *more = printable(text).splitlines() or [""]
    assert all(line.startswith("    ") for line in more)
    assert all(each.isprintable() or each == "\t" for each in "".join([first, *more]))
    assert len(in_one_line(text).splitlines()) <= 1
    printable(text).encode()


# -- logs -----------------------------------------------------------------------------------------------


LOG = logging.getLogger("test.printable")


@pytest.fixture
def written():
    """What is in a server's log: ``written()``."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("[%(levelname).1s] %(message)s"))
    LOG.addHandler(handler)
    LOG.setLevel(logging.DEBUG)
    yield stream.getvalue
    LOG.removeHandler(handler)


@pytest.fixture
async def kernel():
    """A kernel that is being started, by a launcher that says what it likes."""
    allocation = Allocation(ours=True, request=KernelRequest())
    launcher = Launcher("gs-a", allocation, launcher_settings(), addresses=list, events=None, log=LOG)
    launcher.jobid = "7"
    kernel = KernelProcess("k", launcher, tunnel_prefix="/nonexistent/t", transport=TransportSelector(LOG), log=LOG)
    kernel._enter(Phase.STARTING)
    kernel._started = asyncio.get_running_loop().create_future()
    kernel.generation = 1
    return kernel


def is_harmless(written: str) -> bool:
    """Whether only the log's own lines begin at the left, and nothing in it is for a terminal."""
    own = all(line.startswith(("[", "    ")) and not line.startswith("[W 2030") for line in written.splitlines())
    return own and not any(mark in written for mark in "\x1b\x07\x9b\u202e\r")


async def test_what_a_launcher_and_a_kernel_say_forges_no_line_of_the_log(kernel, written):
    """A notice, and why a kernel ended."""
    kernel.launcher.link_message(None, "NOTICE", {"kind": "log", "message": FORGED})
    assert "owned" in written()
    kernel.phase = Phase.LOST
    kernel.message("FAILED", {"generation": 1, "message": FORGED, "argv": [FORGED], "output_tail": FORGED})
    assert written().count("owned") >= 3
    kernel.ended_with_job(f"job 7 is over: {FORGED} again")
    assert "again" in written()
    assert is_harmless(written())


async def test_a_launcher_that_says_too_much_is_cut_short(kernel):
    """Of a kernel's output the end is what counts."""
    fields = {"message": "M" * 30_000, "argv": ["A" * 30_000], "output_tail": "T" * 30_000 + "the end"}
    kernel.message(*bounds.decode(wire.encode("FAILED", kernel_id="k", generation=1, **fields)))
    with pytest.raises(KernelStartError, match="the end") as caught:
        await kernel._started
    assert len(str(caught.value)) < 4 * MAX_TEXT
    assert len(caught.value.output_tail) == MAX_TEXT
    exited = {"kernel_id": "k", "generation": 1, "returncode": 1, "output_tail": fields["output_tail"]}
    kernel.message(*bounds.decode(wire.encode("EXIT", **exited)))
    assert len(kernel.output_tail) == MAX_TEXT


# -- the command line -----------------------------------------------------------------------------------


async def test_the_name_of_somebodys_step_is_shown_not_obeyed():
    """The doctor, and a server's log, say why an orphan is left."""

    class Jobs:
        is_local = True

        async def steps(self, _jobid):
            return [StepInfo(stepid="7.0", name=FORGED)]

    orphan = Orphan(info=JobInfo(jobid="7", state="RUNNING"), since=0.0, due=0.0)
    why = await cancel_orphan(Jobs(), None, orphan)
    assert "owned" in why
    assert is_harmless(f"[W] {why}")


def test_what_the_doctor_finds_is_printed_as_text(capsys):
    """Paths, names of kernels, Slurm's words."""
    doctor = Doctor.__new__(Doctor)
    doctor.notes, doctor.findings, doctor.trouble = [f"[n {FORGED}"], [Finding("job", f"[f {FORGED}")], [f"[t {FORGED}"]
    _print(doctor)
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count("owned") == 3
    assert is_harmless(printed.out + printed.err)


def test_an_error_is_printed_as_text(capsys, monkeypatch):
    """Of any command; Slurm's words, and a kernel's last output, are in it."""

    def fail(_arguments):
        raise GatewaySlurmError(f"[{FORGED}")

    monkeypatch.setattr(app.allocations, "_list", fail)
    assert app.main(["allocations"]) == 1
    assert is_harmless(capsys.readouterr().err.removeprefix("jupyter slurm: "))
