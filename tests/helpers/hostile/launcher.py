"""A launcher that its user has changed: the real one, which also obeys ``orders.json`` in its user's home.

Run by a node's Python in the launcher's place, ``python launcher.py -I - ARGUMENTS``, with the launcher's program on
standard input. An order is ``{"do": NAME, "seconds": N}``, with a method's name.
"""

from __future__ import annotations

import json
import os
import pwd
import sys
import time
import uuid
from typing import Any

PERIOD = 0.02  # seconds between two rounds of an order


class Orders:
    """What the launcher does beside its work."""

    def __init__(self, launcher: Any, wire: Any) -> None:
        self._launcher, self._wire = launcher, wire
        self._path = os.path.join(pwd.getpwuid(os.geteuid()).pw_dir, "orders.json")
        self._seen, self._order, self._until = 0, {}, 0.0  # type: ignore[var-annotated]
        self._round()

    def _round(self) -> None:
        self._launcher._reactor.later(PERIOD, self._round)
        try:
            stamp = os.stat(self._path).st_mtime_ns
            if stamp != self._seen:
                with open(self._path) as file:
                    self._order = json.load(file)
                self._seen, self._until = stamp, time.monotonic() + self._order["seconds"]
        except (OSError, ValueError):
            return
        uplink = self._launcher._uplink
        if time.monotonic() < self._until and uplink.live and len(uplink._sealed) < 1 << 20:
            getattr(self, self._order["do"])()

    def _say(self, *bodies: bytes) -> None:
        for body in bodies:
            self._launcher._uplink.outbox.message(body)
        self._launcher._uplink.flush()

    def _raw(self, name: str, text: bytes) -> bytes:
        return bytes([self._wire.MESSAGES[name][0]]) + text

    def notices(self) -> None:
        """Notices with which the server's log is filled."""
        text = "\x1b[31mred\n" + "x" * 2000
        fields = [{"kind": "log", "error": text, "path": text}, {"kind": "line", "error": text, "kernel_id": text}]
        fields += [{"kind": text}, {"kind": "signal"}]
        self._say(*(self._wire.encode("NOTICE", **one) for one in fields for _ in range(20)))

    def values(self) -> None:
        """Frames that are as large as they may be, of as many values as possible."""
        text = b'{"asked":1,"kernel":[' + b"[],".ljust(3) * 1_390_000 + b"[]]}"
        self._say(self._raw("LOG", text[: self._wire.FRAME_LIMIT - 64]))

    def types(self) -> None:
        """Messages whose fields have other types and values than they should."""
        odd: list[Any] = [None, -1, 1e308, 2**70, "x", [], {}, [[]], {"a": {}}, "\0", True, "é" * 70000]
        names = ["REPORT", "STARTED", "FAILED", "EXIT", "NOTICE", "STEPPED", "STEP_LIST", "PROBED", "LOG"]
        kernel_id = next(iter(self._launcher._kernels), str(uuid.uuid4()))
        for name in names:
            for value in odd:
                keys = ["ports", "pid", "ip", "mode", "kernels", "steps", "streams", "opened", "state", "node", "kind"]
                keys += ["returncode", "error", "generation", "step", "slot", "asked", "text", "minutes"]
                fields = {"kernel_id": kernel_id, **dict.fromkeys(keys, value)}
                self._say(self._raw(name, json.dumps(fields).encode()))

    def invent(self) -> None:
        """Three thousand sessions in the journals' headers."""
        for journal in self._launcher._journals.values():
            journal.positions = {**{uuid.uuid4().hex: 1 for _ in range(3000)}, " read": 0}
            for number in range(1000):
                journal.notes[f"session:{number}"] = json.dumps({"path": "x", "id": str(uuid.uuid4())})


def main() -> None:
    """Run the launcher's program; a server's look for this Python's version goes to the real one."""
    if sys.argv[1:3] != ["-I", "-"]:
        os.execv(sys.executable, [sys.executable, *sys.argv[1:]])  # noqa: S606
    program = sys.stdin.read()
    del sys.argv[0:2]
    head, mark, _main = program.rpartition("from launchers.main import main\n")
    scope: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(head + mark, "-", "exec"), scope)  # noqa: S102 - as Python does with its standard input
    from gateway_slurm.link import wire
    from launchers.main import NodeLauncher

    run = NodeLauncher.run

    def run_with_orders(launcher: Any) -> None:
        Orders(launcher, wire)
        run(launcher)

    NodeLauncher.run = run_with_orders  # type: ignore[method-assign]
    scope["main"]()


if __name__ == "__main__":
    main()
