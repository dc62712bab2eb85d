"""A firewall before the nodes' ports for direct kernels: nftables on this machine, whose nodes they are. Root only."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Below the ports that Linux gives to clients (32768 and up) and the private Slurm takes (10000 and up), which the rules
# must not touch; nor those of another run, beside this one.
LOW = 2000 + 100 * (os.getpid() % 80)
HIGH = LOW + 99
KERNEL_PORTS = f"{LOW}-{HIGH}"


class Firewall:
    """What happens to connections to the kernels' ports; ``open`` takes the rules away."""

    def __init__(self) -> None:
        self._table = f"gateway_slurm_test_{os.getpid()}"

    def drop(self) -> None:
        """Nothing comes back."""
        self._rule("drop")

    def reject(self, words: str) -> None:
        """It says no; ``words`` as in ``reject with …``."""
        self._rule(f"reject with {words}")

    def redirect(self, port: int) -> None:
        """Somebody else answers, on this port."""
        rule = f"tcp dport {KERNEL_PORTS} redirect to :{port}"
        self._load(f"chain other {{\ntype nat hook output priority -100\n{rule}\n}}")

    def _rule(self, verdict: str) -> None:
        rule = f"tcp dport {KERNEL_PORTS} counter {verdict}"
        self._load(f"chain node {{\ntype filter hook input priority 0\n{rule}\n}}")

    def _load(self, chain: str) -> None:
        self.open()
        _nft(f"table inet {self._table} {{\n{chain}\n}}\n")

    def open(self) -> None:
        """Everything goes through."""
        _nft(f"table inet {self._table}\ndelete table inet {self._table}\n")

    @property
    def packets(self) -> int:
        """How many the rule has met."""
        listed = _nft("", "-j", "list", "table", "inet", self._table)
        rules: list[dict[str, Any]] = [each["rule"] for each in json.loads(listed)["nftables"] if "rule" in each]
        return sum(part["counter"]["packets"] for rule in rules for part in rule["expr"] if "counter" in part)


def _nft(script: str, *arguments: str) -> str:
    argv = ["nft", *(arguments or ("-f", "-"))]
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    result = subprocess.run(argv, input=script, capture_output=True, text=True, timeout=30, env=environment)
    assert result.returncode == 0, (argv, script, result.stderr)
    return result.stdout


@contextmanager
def firewall() -> Iterator[Firewall]:
    """One that lets everything through, until it is told otherwise; nothing of it is left."""
    made = Firewall()
    try:
        yield made
    finally:
        made.open()
