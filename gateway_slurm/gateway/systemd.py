"""Reports to systemd, where it runs this process as a service of ``Type=notify``: ready, alive, stopping.

And the listening sockets that it passes, which stay open while this process is restarted.
Source: sd_notify(3), its notes on the protocol; systemd.service(5), ``WatchdogSec``; sd_listen_fds(3);
systemd.socket(5).
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket

from gateway_slurm._util import BEAT_SECONDS, LoopWatch

# Seconds that the service manager waits for READY beyond the next attempt.
EXTENSION_SECONDS = 60.0
READY, ALIVE, STOPPING = "READY=1", "WATCHDOG=1", "STOPPING=1"
# The name of the loop that serves requests, in the log.
MAIN_LOOP = "the gateway's loop"
_log = logging.getLogger(__name__)


HTTP_SOCKET, RESPONSE_SOCKET = "http", "response"
"""``FileDescriptorName`` of the sockets for requests, and for launchers."""
FIRST_DESCRIPTOR, MAX_SOCKETS = 3, 64


def passed_sockets() -> dict[str, list[socket.socket]]:
    """The listening sockets that the service manager opened for this process, by their names.

    A socket of another name is left alone. The caller owns the sockets.
    """
    # Not for the processes that this one starts.
    pid, count, names = (os.environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"))
    found: dict[str, list[socket.socket]] = {HTTP_SOCKET: [], RESPONSE_SOCKET: []}
    if pid != str(os.getpid()) or not (count.isascii() and count.isdigit()):
        return found
    for number, name in zip(range(min(int(count), MAX_SOCKETS)), names.split(":"), strict=False):
        os.set_inheritable(FIRST_DESCRIPTOR + number, False)
        if name in found:
            passed = socket.socket(fileno=FIRST_DESCRIPTOR + number)
            passed.setblocking(False)
            found[name].append(passed)
        else:
            _log.warning("a socket of the service manager is not used: FileDescriptorName is %r", name)
    return found


class ServiceManager:
    """The socket of the service manager that started this process; nothing is sent where there is none."""

    def __init__(self) -> None:
        # Not for the processes that this one starts.
        address = os.environ.pop("NOTIFY_SOCKET", "")
        # A name that begins with "@" is in Linux's abstract namespace.
        self._address = "\0" + address[1:] if address.startswith("@") else address

    def notify(self, state: str) -> None:
        """Send a state; never waits, and raises nothing."""
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.setblocking(False)
                sender.sendto(state.encode(), self._address)
        except OSError as error:
            _log.warning("the service manager could not be notified: %s", error)

    def extend(self, seconds: float) -> None:
        """The start goes on: it takes so many seconds more until the next attempt, and the time for that."""
        self.notify(f"EXTEND_TIMEOUT_USEC={int((seconds + EXTENSION_SECONDS) * 1e6)}")

    async def show_life(self, loops: LoopWatch, seconds: float) -> None:
        """Show that the calling loop runs, to ``loops`` and to the service manager, until the task is cancelled.

        The service manager is not notified while another loop has stood still for so many seconds.
        """
        with loops.following(MAIN_LOOP):
            while True:
                loops.beat(MAIN_LOOP)
                if not loops.standing(seconds):
                    self.notify(ALIVE)
                await asyncio.sleep(BEAT_SECONDS)
