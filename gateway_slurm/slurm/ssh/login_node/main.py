"""The start of a program on the login node: it describes itself to the server, then serves requests."""

from __future__ import annotations

import os
import pwd
import signal
import socket
import sys

from gateway_slurm.slurm.ssh.login_node import protocol
from gateway_slurm.slurm.ssh.login_node.commands import serve_commands
from gateway_slurm.slurm.ssh.login_node.relay import RelayProgram


def main(marker: str, mode: str, silence: float) -> None:
    """Send this process's description after ``marker``, then serve; end after ``silence`` seconds without a frame."""
    # Stray output must not get between the frames.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot = file.read().strip()
    info = {
        "user": pwd.getpwuid(os.getuid()).pw_name,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "ticks": protocol.start_ticks(os.getpid()),
        "boot": boot,
    }
    sys.stdout.buffer.write(f"\n{marker}\n".encode() + protocol.frame(protocol.INFO, 0, protocol.pack(info)))
    sys.stdout.buffer.flush()
    if mode == "relay":
        RelayProgram().run(silence)
    else:
        serve_commands(silence)
    os._exit(0)
