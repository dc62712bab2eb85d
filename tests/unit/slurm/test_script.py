"""The job script, run by the real sh."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway_slurm.slurm.script import job_script

ECHO = "import sys, json\nprint(json.dumps([sys.argv[1:], sys.flags.isolated]))\n"
SHELLS = [shell for shell in ("/bin/sh", "/bin/dash", "/bin/bash") if Path(shell).exists()]


def run(script: str, home: Path, shell: str = "/bin/sh", **env: str) -> subprocess.CompletedProcess[str]:
    """Run a job script as slurmd would, in a home of the test's own."""
    return subprocess.run(
        [shell, "-s"],
        input=script,
        env={"PATH": os.environ["PATH"], "HOME": str(home), "SLURM_JOB_ID": "42", **env},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize("shell", SHELLS)
def test_runs_the_program(shell: str, tmp_path: Path) -> None:
    """The program runs isolated, gets its arguments unchanged, and prints to a private log on the node."""
    arguments = ["a b", "$(id)", "'", '"', "\n", "é", ""]
    script = job_script(ECHO, pythons=["no-such-python", sys.executable], log_dir="~/l o/g", arguments=arguments)
    done = run(script, tmp_path, shell)
    log = tmp_path / "l o" / "g" / "launcher-42.log"
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert log.read_text().strip() == '[["a b", "$(id)", "\'", "\\"", "\\n", "\\u00e9", ""], 1]'
    assert log.stat().st_mode & 0o777 == 0o600
    assert log.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("shell", SHELLS)
def test_slurms_signal_may_come_early(shell: str, tmp_path: Path) -> None:
    """SIGUSR1 does not end a program that has no handler for it yet."""
    program = "import os, signal\nos.kill(os.getpid(), signal.SIGUSR1)\nprint('lives')\n"
    done = run(job_script(program, pythons=[sys.executable], log_dir=str(tmp_path)), tmp_path, shell)
    assert done.returncode == 0
    assert (tmp_path / "launcher-42.log").read_text() == "lives\n"


@pytest.mark.parametrize("shell", SHELLS)
def test_large_program(shell: str, tmp_path: Path) -> None:
    """A program larger than a pipe arrives whole."""
    program = "\n".join(f"x{number} = '$HOME `id` \\\\ {number}'" for number in range(9000)) + "\nprint(x8999)\n"
    done = run(job_script(program, pythons=[sys.executable], log_dir=str(tmp_path)), tmp_path, shell)
    assert done.returncode == 0
    assert (tmp_path / "launcher-42.log").read_text() == "$HOME `id` \\ 8999\n"


@pytest.mark.parametrize("shell", SHELLS)
def test_no_python(shell: str, tmp_path: Path) -> None:
    """A node without any of the Pythons ends the job with 127 and a line that names them."""
    done = run(job_script("pass", pythons=["no-such-python", "~/nor-this"], log_dir="~/log"), tmp_path, shell)
    assert done.returncode == 127
    assert "no-such-python" in (tmp_path / "log" / "launcher-42.log").read_text()


@pytest.mark.parametrize("shell", SHELLS)
def test_log_directory_cannot_be_made(shell: str, tmp_path: Path) -> None:
    """The program runs even if no log can be written."""
    (tmp_path / "file").touch()
    program = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    done = run(job_script(program, pythons=[sys.executable], log_dir="~/file/log"), tmp_path, shell)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("shell", SHELLS)
def test_log_is_a_directory(shell: str, tmp_path: Path) -> None:
    """A log file that cannot be opened does not stop the program either."""
    (tmp_path / "launcher-42.log").mkdir()
    program = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    run(job_script(program, pythons=[sys.executable], log_dir=str(tmp_path)), tmp_path, shell)
    assert (tmp_path / "ran").exists()


def test_nul_is_refused() -> None:
    """A NUL, which no script can contain, is refused, and so is a script without a Python."""
    for program, argument in (("\0", ""), ("", "\0")):
        with pytest.raises(ValueError, match="NUL"):
            job_script(program, pythons=["python3"], log_dir="~/l", arguments=[argument])
    with pytest.raises(ValueError, match="at least one"):
        job_script("", pythons=[], log_dir="~/l")


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0")))
def test_program_is_verbatim(program: str) -> None:
    """The script contains every program unchanged, and no line of it ends the here-document."""
    script = job_script(program, pythons=["python3"], log_dir="~/l")
    marker = script.partition("<<'")[2].partition("'")[0]
    assert f"<<'{marker}'\n{program.removesuffix(chr(10))}\n{marker}\n" in script
    assert marker not in program.split("\n")


@settings(max_examples=15, deadline=None)
@given(argument=st.text(st.characters(codec="utf-8", exclude_characters="\0")))
def test_arguments_survive_the_shell(argument: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Any argument reaches the program unchanged."""
    home = tmp_path_factory.mktemp("home")
    program = "import os, sys\nos.write(1, os.fsencode(sys.argv[1]))\n"
    script = job_script(program, pythons=[sys.executable], log_dir="~/", arguments=[argument])
    assert run(script, home, LC_ALL="C.UTF-8").returncode == 0
    assert (home / "launcher-42.log").read_bytes() == argument.encode()
