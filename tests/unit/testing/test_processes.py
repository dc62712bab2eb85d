"""The private cluster's daemons, as processes."""

from __future__ import annotations

import subprocess
import sys

from gateway_slurm.testing.processes import Process, _read_stat
from helpers.private_slurm import poll

# The first thread ends by exit(2), not exit_group(2); the other one when its standard input does.
FIRST_THREAD_ENDS = """
import ctypes, sys, threading
threading.Thread(target=sys.stdin.read).start()
ctypes.CDLL(None).syscall({exit}, 0)
"""
SYS_EXIT = {"x86_64": 60, "aarch64": 93}


def test_a_process_is_alive_until_its_last_thread_has_ended():
    """Its first one is a zombie by then; the next daemon would find the locks of this one."""
    machine = subprocess.run(["uname", "-m"], capture_output=True, text=True, check=True).stdout.strip()
    argv = [sys.executable, "-c", FIRST_THREAD_ENDS.format(exit=SYS_EXIT[machine])]
    with subprocess.Popen(argv, stdin=subprocess.PIPE) as child:

        def state() -> str:
            stat = _read_stat(child.pid)
            return stat.state if stat is not None else ""

        stat = _read_stat(child.pid)
        assert stat is not None
        process = Process(child.pid, stat.start_time)
        assert poll(lambda: state() == "Z", timeout=10)
        assert process.alive()
        assert child.stdin is not None
        child.stdin.close()
        assert poll(lambda: not process.alive(), timeout=10)
        assert state() == "Z"
