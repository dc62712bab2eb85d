"""A firewall in front of the ports of direct kernels: nftables on this machine, where all nodes are. It needs root."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# The rules must not affect the ports of clients (from 32768 on), of the private Slurm (from 10000 on), or of other test
# runs at the same time.
LOW = 2000 + 100 * (os.getpid() % 80)
HIGH = LOW + 99
KERNEL_PORTS = f"{LOW}-{HIGH}"


class Firewall:
    """Rules for connections to the kernels' ports; ``open`` removes them."""

    def __init__(self) -> None:
        self._table = f"gateway_slurm_test_{os.getpid()}"

    def drop(self) -> None:
        """Drop packets, so that a client gets no answer."""
        self._rule("drop")

    def reject(self, words: str) -> None:
        """Reject packets; ``words`` as in nft's ``reject with …``."""
        self._rule(f"reject with {words}")

    def redirect(self, port: int) -> None:
        """Redirect connections to another port."""
        rule = f"tcp dport {KERNEL_PORTS} redirect to :{port}"
        self._load(f"chain other {{\ntype nat hook output priority -100\n{rule}\n}}")

    def _rule(self, verdict: str) -> None:
        rule = f"tcp dport {KERNEL_PORTS} counter {verdict}"
        self._load(f"chain node {{\ntype filter hook input priority 0\n{rule}\n}}")

    def _load(self, chain: str) -> None:
        self.open()
        _nft(f"table inet {self._table} {{\n{chain}\n}}\n")

    def open(self) -> None:
        """Let everything through."""
        _nft(f"table inet {self._table}\ndelete table inet {self._table}\n")

    @property
    def packets(self) -> int:
        """The number of packets that matched the rule."""
        listed = _nft("", "-j", "list", "table", "inet", self._table)
        rules: list[dict[str, Any]] = [item["rule"] for item in json.loads(listed)["nftables"] if "rule" in item]
        return sum(part["counter"]["packets"] for rule in rules for part in rule["expr"] if "counter" in part)


def _nft(script: str, *arguments: str) -> str:
    argv = ["nft", *(arguments or ("-f", "-"))]
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    result = subprocess.run(argv, input=script, capture_output=True, text=True, timeout=30, env=environment)
    assert result.returncode == 0, (argv, script, result.stderr)
    return result.stdout


@contextmanager
def firewall() -> Iterator[Firewall]:
    """A firewall that at first lets everything through; its rules are removed at the end."""
    made = Firewall()
    try:
        yield made
    finally:
        made.open()
