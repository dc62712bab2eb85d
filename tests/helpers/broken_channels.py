"""Code that a hostile kernel runs in a cell: it breaks its own channels, as a server sees them."""

from __future__ import annotations

from pathlib import Path

# What is done to a channel: its open connections get a frame that is none of ZMTP's (a length of 2^64 - 1), or the
# announcement of a frame of 1 TiB; or they end and later ones are accepted and never read, or refused.
KINDS = ("malformed", "huge", "deaf", "closed")

_CODE = """
import json, os, socket, ipykernel

def addresses(channel):
    with open(ipykernel.get_connection_file()) as file:
        info = json.load(file)
    port = info[channel + "_port"]
    return (f"{{info['ip']}}-{{port}}",) if info["transport"] == "ipc" else (("127.0.0.1", port), (info["ip"], port))

def break_channel(channel, kind):
    wanted, listener = addresses(channel), None
    for number in map(int, os.listdir("/proc/self/fd")):
        try:
            found = socket.socket(fileno=os.dup(number))
            if found.family not in (socket.AF_UNIX, socket.AF_INET) or found.getsockname() not in wanted:
                continue
        except OSError:
            continue
        if not found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            if kind == "malformed":
                found.sendall(b"\\xff" * 32)
            elif kind == "huge":
                found.sendall(b"\\x02" + (1 << 40).to_bytes(8, "big") + bytes(1000))
            else:
                found.shutdown(socket.SHUT_RDWR)
        elif kind in ("deaf", "closed"):
            listener = number, found.family, found.getsockname()
        found.close()
    if listener:
        number, family, address = listener
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, number)  # closes ipykernel's own listener
        if family == socket.AF_UNIX:
            os.unlink(address)
        if kind == "deaf":
            deaf = socket.socket(family)
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            deaf.bind(address)
            deaf.listen()
            globals().setdefault("deaf_ears", []).append(deaf)

for channel in {channels!r}:
    break_channel(channel, {kind!r})
open({done!r}, "x").close()
"""


def breaking(kind: str, done: Path, *channels: str) -> str:
    """A cell that breaks the channels of its kernel and then makes the file ``done``; its reply may not arrive."""
    return _CODE.format(kind=kind, channels=channels, done=str(done))
