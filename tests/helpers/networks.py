"""Test networks: hosts that are network namespaces, with a firewall between them. They need root.

Each host has one interface, to the firewall, which forwards only the allowed connections (ip-netns(8), nft(8)).
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from gateway_slurm.testing import Host
from gateway_slurm.testing.processes import search_path

_CLONE_NEWNET = 0x40000000  # setns(2); Python has it from 3.12 on
_NAMESPACES = Path("/run/netns")
_PREFIX = "gsnet"


@dataclass(frozen=True)
class Flow:
    """TCP connections from one host to ports of another, such as ``"22"`` or ``"5000-5009"``."""

    source: str
    target: str
    ports: str


class Network:
    """``hosts`` and the firewall between them. ``up`` makes them, ``down`` removes them.

    The namespaces' names contain this process's id. The next run removes the namespaces of a killed run.
    """

    def __init__(self, *hosts: str) -> None:
        self.hosts = {name: f"10.77.{number}.2" for number, name in enumerate(hosts, 1)}

    def up(self) -> None:
        """Make the hosts; the firewall lets nothing through. Raises AssertionError with the command's error."""
        _remove_abandoned()
        _ip("netns", "add", self._namespace("firewall"))
        with self.entered("firewall"):
            Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
        self.allow()
        for number, name in enumerate(self.hosts, 1):
            self._join(name, f"10.77.{number}")

    def down(self) -> None:
        """Remove the namespaces that exist."""
        for name in [*self.hosts, "firewall"]:
            if (_NAMESPACES / self._namespace(name)).exists():
                _ip("netns", "delete", self._namespace(name))

    def host(self, name: str) -> Host:
        """The host as an argument for PrivateCluster and LoginNode."""
        return Host(self.hosts[name], self._prefix(name))

    def pids(self, name: str) -> set[int]:
        """The processes on the host, without zombies."""
        namespace = (_NAMESPACES / self._namespace(name)).stat()
        return {int(path.name) for path in Path("/proc").glob("[0-9]*") if _is_in(path, namespace)}

    def allow(self, *flows: Flow) -> None:
        """Allow these connections and no others."""
        rules = "\n".join(f"{_match(flow)} accept" for flow in flows)
        self._nft(f"""
            flush ruleset
            table inet site {{
                chain cut {{
                }}
                chain forward {{
                    type filter hook forward priority 0; policy drop;
                    jump cut
                    ct state established,related accept
                    {rules}
                    counter drop
                }}
            }}
        """)

    @contextmanager
    def cut(self, *flows: Flow) -> Iterator[None]:
        """In the block all packets of these connections are lost, including those of open connections."""
        both = [
            f"add rule inet site cut {_match(flow, at)} counter drop" for flow in flows for at in ("dport", "sport")
        ]
        self._nft("\n".join(both))
        try:
            yield
        finally:
            self._nft("flush chain inet site cut")

    @contextmanager
    def away(self, host: str) -> Iterator[None]:
        """In the block no packet reaches or leaves the host, as if it had lost power."""
        rules = [f'add rule inet site cut {way} "{host}" counter drop' for way in ("iifname", "oifname")]
        self._nft("\n".join(rules))
        try:
            yield
        finally:
            self._nft("flush chain inet site cut")

    def dropped(self) -> int:
        """The number of packets dropped since ``allow``, including those of current cuts."""
        listing = json.loads(self._in("firewall", "nft", "--json", "list", "ruleset"))
        expressions = [part for item in listing["nftables"] for part in item.get("rule", {}).get("expr", ())]
        return sum(part["counter"]["packets"] for part in expressions if isinstance(part.get("counter"), dict))

    def _join(self, name: str, subnet: str) -> None:
        firewall, namespace = self._namespace("firewall"), self._namespace(name)
        _ip("netns", "add", namespace)
        _ip("link", "add", "name", name, "netns", firewall, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        _ip("-n", firewall, "address", "add", f"{subnet}.1/24", "dev", name)
        _ip("-n", firewall, "link", "set", "dev", name, "up")
        _ip("-n", namespace, "address", "add", f"{subnet}.2/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", namespace, "link", "set", "dev", device, "up")
        # There is no other route, so that a query to a name server fails at once.
        _ip("-n", namespace, "route", "add", "10.77.0.0/16", "via", f"{subnet}.1")

    def _namespace(self, name: str) -> str:
        return f"{_PREFIX}-{os.getpid()}-{name}"

    def _prefix(self, name: str) -> tuple[str, ...]:
        # Not `ip netns exec`, which mounts another /sys.
        return ("nsenter", f"--net={_NAMESPACES / self._namespace(name)}", "--")

    def _in(self, name: str, *argv: str, text: str = "") -> str:
        return _run([*self._prefix(name), *argv], text)

    def _nft(self, text: str) -> None:
        self._in("firewall", "nft", "--file", "-", text=text)

    @contextmanager
    def entered(self, name: str) -> Iterator[None]:
        """In the block this thread, and the threads and processes that it starts, are on that host."""
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            _enter(_NAMESPACES / self._namespace(name))
            try:
                yield
            finally:
                _set_namespace(before)
        finally:
            os.close(before)


@contextmanager
def network(*hosts: str) -> Iterator[Network]:
    """Hosts without any allowed connection; they are removed at the end."""
    made = Network(*hosts)
    try:
        made.up()
        yield made
    finally:
        made.down()


def _is_in(process: Path, namespace: os.stat_result) -> bool:
    try:
        status = (process / "ns" / "net").stat()
    except OSError:  # the process has ended
        return False
    return (status.st_dev, status.st_ino) == (namespace.st_dev, namespace.st_ino)


def _match(flow: Flow, at: str = "dport") -> str:
    source, target = (flow.source, flow.target) if at == "dport" else (flow.target, flow.source)
    return f'iifname "{source}" oifname "{target}" tcp {at} {flow.ports}'


def _ip(*argv: str) -> str:
    return _run(["ip", *argv])


def _run(argv: Iterable[str], text: str = "") -> str:
    environment = {**os.environ, "PATH": search_path()}  # nft is in a system directory
    done = subprocess.run(list(argv), input=text, capture_output=True, text=True, timeout=30, env=environment)
    if done.returncode != 0:
        raise AssertionError(f"{' '.join(argv)} said: {done.stderr.strip()} (test networks need root)")
    return done.stdout


def _enter(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _set_namespace(descriptor)
    finally:
        os.close(descriptor)


def _set_namespace(descriptor: int) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


def _remove_abandoned() -> None:
    if not _NAMESPACES.is_dir():
        return
    for path in _NAMESPACES.glob(f"{_PREFIX}-*"):
        if not Path("/proc", path.name.split("-")[1]).exists():
            with suppress(AssertionError):  # another run may remove it at the same time
                _ip("netns", "delete", path.name)
