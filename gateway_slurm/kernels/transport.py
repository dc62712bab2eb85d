"""How clients reach a kernel: direct by TCP where its node can be dialled from this machine, else through the tunnel.

Clients of a kernel run in this process or on this machine, so they can dial what this process can dial. Before a start
the launcher listens for a moment on the ports that the kernel will get. The server sends it, over the link, a random
question and its answer; then it dials the ports and asks. Only the right answer proves that the node was reached.

The server dials the address from which the launcher's link comes (on a restart, the one at the kernel's first start),
which TCP has proved. It never dials an address that a launcher names, and sends nothing but the question there. Where
the node's own address is another one, addresses are translated on the way, and the kernel uses the tunnel.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import secrets
import time
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import zmq

from gateway_slurm._util import Backoff
from gateway_slurm.allocations.launcher import Launcher
from gateway_slurm.errors import LinkError, NodeUnreachable, RequestError
from gateway_slurm.kernels.model import KernelLaunch
from gateway_slurm.link import wire
from gateway_slurm.store.records import KernelRecord

T = TypeVar("T")

CONNECT_SECONDS: Final = 1.0
ANSWER_SECONDS: Final = 1.0
SLACK_SECONDS: Final = 0.05
"""Added to both for results that were there in time while the loop was busy."""
SILENT_SECONDS: Final = 60.0
"""A node that did not answer in CONNECT_SECONDS is not dialled for so long; each further failure doubles it."""
MAX_SILENT_SECONDS: Final = 900.0
MAX_SILENT_NODES: Final = 4096
FIRST_USER_PORT: Final = 1024

NO_PROBES = "its launcher is of an older version, which cannot listen for a test"
NOT_KEPT = "its output is not kept on the node while no client reads it (connect = tunnel keeps it)"
TIMED_OUT: Final = "timed out"

_now = time.monotonic


def choose_mode(
    requested: str | None, default: str, metadata: dict[str, Any], *, curve_required: bool, keeps_output: bool
) -> tuple[str, str]:
    """Return ``direct``, ``ipc`` (tunnel) or, where the node decides, ``auto``; and why, or what the mode costs.

    ``requested`` is the request's ``connect``, ``default`` the service's, ``metadata`` the kernelspec's. The launcher
    keeps the output of a kernel behind the tunnel only, so where the server wants it kept (``keeps_output``) ``auto``
    is the tunnel. Raises RequestError when the request requires a direct kernel, or CurveZMQ, and that is impossible.
    """
    mode, set_by = (requested, "its kernelspec asks for") if requested else (default, "SlurmService.connect is")
    obstacle = "" if _declares_curve(metadata) else "the kernel does not declare CurveZMQ (supported_encryption)"
    if not obstacle and not zmq.has("curve"):
        obstacle = "ZeroMQ was built without CurveZMQ on this machine"
    if mode == "direct" and obstacle:
        raise RequestError(
            "connect = direct needs a kernel that supports CurveZMQ (metadata.supported_encryption of its "
            f"kernelspec names curve; ipykernel >= 7.4 does), and {obstacle}; use connect = tunnel",
            field="connect",
        )
    tunnel_reason = f"{set_by} tunnel" if mode == "tunnel" else obstacle
    if not tunnel_reason and keeps_output:
        if mode == "direct" or curve_required:
            return "direct", NOT_KEPT
        tunnel_reason = "its output is kept on the node (SlurmService.kept_output), which needs the tunnel"
    if not curve_required:
        return ("ipc" if tunnel_reason else mode), tunnel_reason
    if tunnel_reason:
        raise RequestError(
            "transport_encryption is required, but this kernel uses the tunnel, whose ends are not CurveZMQ sockets "
            "(the link encrypts its bytes); use connect = direct",
            field="connect",
        )
    return "direct", ""


def _declares_curve(metadata: dict[str, Any]) -> bool:
    declared = metadata.get("supported_encryption") or []
    names = [declared] if isinstance(declared, str) else declared
    return "curve" in (str(name).strip().lower() for name in names)


def checked_ports(ports: Any, port_range: tuple[int, int] | None) -> dict[str, int]:
    """A launcher's answer, if it is a permitted port for each of the five channels. Raises LinkError."""
    low, high = port_range or (FIRST_USER_PORT, 65535)
    if not isinstance(ports, dict) or set(ports) != set(wire.CHANNELS):
        raise LinkError(f"the launcher did not name a port for each channel, but {str(ports)[:200]}")
    for port in ports.values():
        if type(port) is not int or not low <= port <= high:
            raise LinkError(f"the launcher named port {str(port)[:20]}, which is not from {low} to {high}")
    return {channel: ports[channel] for channel in wire.CHANNELS}


Endpoint = tuple[str, dict[str, int]]
"""A node's address, and a port for each channel."""


@dataclass(frozen=True)
class Selection:
    """A launch whose mode is ``direct`` or ``ipc``; a direct kernel has its address, and its ports where tested."""

    launch: KernelLaunch
    ip: str = ""
    ports: dict[str, int] | None = None


class _CannotDial(Exception):
    """The reason, in words that follow "node N"."""


@dataclass
class _SilentNode:
    """A node that did not answer: it is not dialled before ``until``, by the monotonic clock."""

    failure: str
    until: float
    pauses: Backoff


class TransportSelector:
    """Selects the transport for each start, and remembers nodes that did not answer. Lives on the service's loop."""

    def __init__(self, log: logging.Logger) -> None:
        self.log = log
        self._silent: dict[str, _SilentNode] = {}

    async def select(
        self,
        launch: KernelLaunch,
        launcher: Launcher,
        kernel_id: str,
        last_launch: KernelLaunch | None,
        last_endpoint: Endpoint,
    ) -> Selection:
        """Select the transport of a kernel on ``launcher``'s node.

        ``last_launch`` is None at the first start. A restart keeps transport, address and ports, since clients are
        connected by them; a direct kernel whose node can no longer be dialled changes to the tunnel. ``last_endpoint``
        is where a direct kernel listened: by now its launcher's link may come from another address of the node.
        Raises NodeUnreachable for a kernel that must be direct and cannot be.
        """
        if launch.mode == "ipc":
            selection = Selection(launch)
        elif launch.mode == "auto" and last_launch is not None and last_launch.mode == "ipc":
            selection = Selection(launch.tunnelled(last_launch.why))
        else:
            kept = last_endpoint if last_launch is not None and last_launch.mode == "direct" else None
            try:
                selection = await self._select_direct(launch, launcher, kernel_id, kept)
            except _CannotDial as error:
                selection = _fall_back(launch, f"node {launcher.node} {error}")
        name = "direct" if selection.launch.mode == "direct" else "tunnel"
        self.log.info("kernel %s: %s: %s", kernel_id, name, selection.launch.why)
        return selection

    async def fallback_reasons(self, records: Iterable[KernelRecord]) -> dict[str, str]:
        """Of an earlier server's direct kernels, those whose node cannot be dialled from this machine, and the reason.

        One kernel of each node is dialled. If that kernel is over, its port refuses; then the node's other kernels are
        reached through the tunnel, which works as well.
        """
        direct = [record for record in records if record.mode == "direct" and record.ports]
        ports = {record.ip: min(record.ports.values()) for record in direct}
        results = await asyncio.gather(*(_connect(ip, port) for ip, port in ports.items()))
        failures = {ip: failure for ip, failure in zip(ports, results, strict=True) if failure}
        for ip, failure in failures.items():
            self.log.warning("kernels on %s are reached through the tunnel: %s", ip, failure)
        return {
            record.kernel_id: f"its node could not be dialled at {failures[record.ip]} when this server took it over"
            for record in direct
            if record.ip in failures
        }

    async def _select_direct(
        self, launch: KernelLaunch, launcher: Launcher, kernel_id: str, kept: Endpoint | None
    ) -> Selection:
        """Raises _CannotDial."""
        must_be_direct = launch.mode == "direct"
        if not launcher.probes:
            if not must_be_direct:
                raise _CannotDial(f"was not dialled: {NO_PROBES}")
            why = f"connect = direct; node {launcher.node} was not dialled: {NO_PROBES}"
            return Selection(launch.direct(_joined(why, launch.why)), _address(launcher), kept and kept[1])
        ip, ports = kept or (_address(launcher), None)
        node = self._silent.get(ip)
        if node is not None and not must_be_direct and (seconds := node.until - _now()) > 0:
            raise _CannotDial(f"{node.failure} (a while ago; the next attempt is possible in {seconds:.0f} s)")
        ports = await self._test(launch, launcher, kernel_id, ip, ports)
        self._silent.pop(ip, None)
        success = f"node {launcher.node} can be dialled at {ip}"
        why = f"connect = direct, and {success}" if must_be_direct else success
        return Selection(launch.direct(_joined(why, launch.why)), ip, ports)

    async def _test(
        self, launch: KernelLaunch, launcher: Launcher, kernel_id: str, ip: str, kept: dict[str, int] | None
    ) -> dict[str, int]:
        """Return the ports on which the launcher listened, once all of them have answered. Raises _CannotDial."""
        words = {"question": secrets.token_hex(16), "answer": secrets.token_hex(16)}
        try:
            reply = await launcher.prober.ask(
                kernel_id=kernel_id, ip=ip, ports=kept, port_range=launch.port_range, **words
            )
            if "error" in reply:
                raise LinkError(f"its launcher cannot listen: {str(reply['error'])[:200]}")
            ports = checked_ports(reply.get("ports"), launch.port_range)
        except LinkError as error:
            raise _CannotDial(f"was not dialled: {error}") from error
        results = await _ask_all(ip, ports, **words)
        failures = [failure for failure in results if failure]
        if failures:
            reason = f"could not be dialled at {failures[0]}"
            if any(failure.endswith(TIMED_OUT) for failure in failures):
                self._remember_silent(ip, reason)
            raise _CannotDial(reason)
        return ports

    def _remember_silent(self, ip: str, failure: str) -> None:
        known = self._silent.pop(ip, None)
        pauses = known.pauses if known is not None else Backoff(SILENT_SECONDS, MAX_SILENT_SECONDS)
        while len(self._silent) >= MAX_SILENT_NODES:
            del self._silent[next(iter(self._silent))]
        self._silent[ip] = _SilentNode(failure, _now() + pauses.next(), pauses)


def _fall_back(launch: KernelLaunch, reason: str) -> Selection:
    """Select the tunnel. Raises NodeUnreachable for a kernel that must be direct."""
    if launch.mode == "direct":
        ports = "{}-{}".format(*launch.port_range) if launch.port_range else "any, without SlurmService.kernel_ports"
        raise NodeUnreachable(
            f"connect = direct, but {reason}. Clients dial a direct kernel from this machine: let its nodes accept "
            f"connections from here (ports {ports}), or use connect = auto or tunnel"
        )
    return Selection(launch.tunnelled(reason))


def _joined(why: str, cost: str) -> str:
    return f"{why}; {cost}" if cost else why


def _address(launcher: Launcher) -> str:
    """The address of the launcher's link, if it is the node's own and of a kind that Jupyter's clients dial.

    Raises _CannotDial.
    """
    link_address, node_address = _plain(launcher.peer), _plain(launcher.own_ip)
    if link_address is None or node_address is None:
        raise _CannotDial("was not dialled: the address of its launcher's link is not known")
    if link_address != node_address:
        raise _CannotDial(
            f"was not dialled: its launcher's link comes from {link_address}, and its own address is {node_address}: "
            "addresses are translated, or connections forwarded, between it and this server"
        )
    if link_address.version != 4:
        raise _CannotDial(f"was not dialled: Jupyter's clients dial IPv4 addresses only, and it has {link_address}")
    return str(link_address)


def _plain(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address; a socket for both families shows an IPv4 address as ``::ffff:…``, which becomes IPv4 again."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return (address.ipv4_mapped or address) if isinstance(address, ipaddress.IPv6Address) else address


# -- Dialling -------------------------------------------------------------------------------------


async def _ask_all(ip: str, ports: dict[str, int], *, question: str, answer: str) -> list[str]:
    """Ask all ports at once; for each the failure, or "" where the launcher answered."""
    return await asyncio.gather(*(_ask(ip, port, question.encode(), answer.encode()) for port in ports.values()))


async def _ask(ip: str, port: int, question: bytes, answer: bytes) -> str:
    try:
        reader, writer = await _dial(ip, port, len(answer))
    except _CannotDial as error:
        return str(error)
    try:
        writer.write(question)
        reply = await _in_time(reader.readexactly(len(answer)), ANSWER_SECONDS)
    except (asyncio.TimeoutError, asyncio.IncompleteReadError, OSError):
        reply = b""
    finally:
        writer.transport.abort()
    return "" if wire.same(reply, answer) else f"{ip}:{port}: the process that listens there is not its launcher"


async def _connect(ip: str, port: int) -> str:
    """Dial one port and hang up; the failure, or ""."""
    try:
        (await _dial(ip, port, 1))[1].transport.abort()
    except _CannotDial as error:
        return str(error)
    return ""


async def _dial(ip: str, port: int, limit: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Raises _CannotDial."""
    try:
        return await _in_time(asyncio.open_connection(ip, port, limit=limit), CONNECT_SECONDS)
    except asyncio.TimeoutError as error:
        raise _CannotDial(f"{ip}:{port}: {TIMED_OUT}") from error
    except OSError as error:
        raise _CannotDial(f"{ip}:{port}: {os.strerror(error.errno) if error.errno else error}") from error


async def _in_time(coroutine: Coroutine[Any, Any, T], seconds: float) -> T:
    """The result. Raises TimeoutError after ``seconds``, unless it was there before the busy loop looked."""
    task = asyncio.ensure_future(coroutine)
    try:
        for timeout in (seconds, SLACK_SECONDS):
            if (await asyncio.wait({task}, timeout=timeout))[0]:
                return task.result()
        raise asyncio.TimeoutError
    finally:
        task.cancel()
