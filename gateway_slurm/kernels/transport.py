"""How clients get to a kernel: direct where its node can be dialled from here, else through the tunnel.

Clients of a kernel are in this process, or on this machine: what this process can dial they can. Before a start
the launcher listens for a moment on the ports that the kernel would get, and answers a random word with another one,
both of which were given to it over the link. Only that answer says that the node was reached.

What is dialled is the address that the launcher's link comes from, or came from when the kernel was started first,
which TCP has proved, and never one that a launcher names; nothing but that word is sent there. An address of the node's
own that differs is behind address translation.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import zmq

from gateway_slurm.errors import LinkError, NodeUnreachable, RequestError
from gateway_slurm.kernels.model import KernelLaunch
from gateway_slurm.link import wire

if TYPE_CHECKING:
    from gateway_slurm.allocations.launcher import Launcher
    from gateway_slurm.store.records import KernelRecord

CONNECT_SECONDS: Final = 1.0
WORD_SECONDS: Final = 1.0
SLACK_SECONDS: Final = 0.05
"""For answers that were there in time, where this loop was not."""
REMEMBER_SECONDS: Final = 60.0
"""For which a node that did not answer in CONNECT_SECONDS is not dialled; twice as long each time."""
REMEMBER_LONGEST: Final = 900.0
REMEMBER_NODES: Final = 4096
FIRST_USER_PORT: Final = 1024

OLDER = "its launcher is of an older version, which cannot be asked to listen for a moment"


NOT_KEPT = "its output is not kept on the node while no client reads it (connect = tunnel keeps it)"


def choose_mode(
    asked: str | None, admins: str, metadata: dict[str, Any], *, curve_required: bool, keeps_output: bool
) -> tuple[str, str]:
    """Return ``direct``, ``ipc`` (tunnel) or, where the node decides, ``auto``; and why, or what the mode costs.

    ``asked`` is the request's ``connect``, ``admins`` the service's, ``metadata`` the kernelspec's. The launcher keeps
    the output of a kernel behind the tunnel only, so where the server wants it kept (``keeps_output``) ``auto`` is the
    tunnel. Raises RequestError when the request requires a direct kernel, or CurveZMQ, and that is impossible.
    """
    wanted, set_by = (asked, "its kernelspec asks for") if asked else (admins, "SlurmService.connect is")
    why_not = "" if _declares_curve(metadata) else "the kernel does not declare CurveZMQ (supported_encryption)"
    if not why_not and not zmq.has("curve"):
        why_not = "ZeroMQ was built without CurveZMQ on this machine"
    if wanted == "direct" and why_not:
        raise RequestError(
            "connect = direct needs a kernel that supports CurveZMQ (metadata.supported_encryption of its "
            f"kernelspec names curve; ipykernel >= 7.4 does), and {why_not}; use connect = tunnel",
            field="connect",
        )
    tunnel = f"{set_by} tunnel" if wanted == "tunnel" else why_not
    if not tunnel and keeps_output:
        if wanted == "direct" or curve_required:
            return "direct", NOT_KEPT
        tunnel = "its output is kept on the node (SlurmService.kept_output), which needs the tunnel"
    if not curve_required:
        return ("ipc" if tunnel else wanted), tunnel
    if tunnel:
        raise RequestError(
            "transport_encryption is required, but this kernel goes through the tunnel, whose ends are not "
            "CurveZMQ sockets (its bytes are encrypted by the link); use connect = direct",
            field="connect",
        )
    return "direct", ""


def _declares_curve(metadata: dict[str, Any]) -> bool:
    declared = metadata.get("supported_encryption") or []
    names = [declared] if isinstance(declared, str) else list(declared)
    return "curve" in {str(name).strip().lower() for name in names}


def ports_of(told: Any, port_range: tuple[int, int] | None) -> dict[str, int]:
    """The five ports that a launcher says, if they are all that they may be. Raises LinkError."""
    low, high = port_range or (FIRST_USER_PORT, 65535)
    if not isinstance(told, dict) or set(told) != set(wire.CHANNELS):
        raise LinkError(f"the launcher did not name a port for each channel, but {str(told)[:200]}")
    for port in told.values():
        if type(port) is not int or not low <= port <= high:
            raise LinkError(f"the launcher named port {str(port)[:20]}, which is not from {low} to {high}")
    return {channel: told[channel] for channel in wire.CHANNELS}


Where = tuple[str, dict[str, int]]
"""A node's address, and a port for each channel."""


@dataclass(frozen=True)
class Selection:
    """A launch whose way is decided; for a direct kernel with its address, and its ports where they were tried."""

    launch: KernelLaunch
    ip: str = ""
    ports: dict[str, int] | None = None


class _CannotDial(Exception):
    """Why not, in words that follow "node N"."""


@dataclass
class _Silent:
    """A node that did not answer: not to be dialled before ``until``, by the monotonic clock."""

    words: str
    until: float
    pause: float


class TransportSelector:
    """Decides for each start; remembers which nodes did not answer. Lives on the service's loop."""

    def __init__(self, log: logging.Logger) -> None:
        self.log = log
        self._silent: dict[str, _Silent] = {}

    async def select(
        self, launch: KernelLaunch, launcher: Launcher, kernel_id: str, last: KernelLaunch | None, was: Where
    ) -> Selection:
        """Decide the way of a kernel on ``launcher``'s node; ``last`` is how it was started before, if it was.

        A restart keeps the way, the address and the ports, since clients are connected by them; only one that is
        direct, and whose node cannot be dialled any more, goes through the tunnel. ``was`` is where a direct kernel
        was; its launcher's link may come from another address of the node by now. Raises NodeUnreachable where it
        must be direct and cannot.
        """
        kept = was if last is not None and last.mode == "direct" else None
        selected = await self._select(launch, launcher, kernel_id, last, kept)
        way = "direct" if selected.launch.mode == "direct" else "tunnel"
        self.log.info("kernel %s: %s: %s", kernel_id, way, selected.launch.why)
        return selected

    async def fallback_reasons(self, records: Iterable[KernelRecord]) -> dict[str, str]:
        """Of the direct kernels that an earlier server had, those whose node cannot be dialled from here; and why.

        Of each node one kernel is dialled. It may be over, and its port refuse: by the tunnel the others of that node
        are reached all the same.
        """
        direct = [record for record in records if record.mode == "direct" and record.ports]
        ports = {record.ip: min(record.ports.values()) for record in direct}
        failures = await asyncio.gather(*(_connect(ip, port) for ip, port in ports.items()))
        why = {ip: failure for ip, failure in zip(ports, failures, strict=True) if failure}
        for ip, failure in why.items():
            self.log.warning("kernels on %s are reached through the tunnel: %s", ip, failure)
        return {
            record.kernel_id: f"its node could not be dialled at {why[record.ip]} when this server took it over"
            for record in direct
            if record.ip in why
        }

    async def _select(
        self, launch: KernelLaunch, launcher: Launcher, kernel_id: str, last: KernelLaunch | None, kept: Where | None
    ) -> Selection:
        if launch.mode == "ipc":
            return Selection(launch)
        if launch.mode == "auto" and last is not None and last.mode == "ipc":
            return Selection(launch.tunnelled(last.why))
        try:
            return await self._direct(launch, launcher, kernel_id, kept)
        except _CannotDial as error:
            words = f"node {launcher.node} {error}"
        if launch.mode == "direct":
            among = (
                "{}-{}".format(*launch.port_range) if launch.port_range else "any, without SlurmService.kernel_ports"
            )
            raise NodeUnreachable(
                f"connect = direct, but {words}. Clients dial a direct kernel from this machine: have its nodes accept "
                f"connections from here (ports {among}), or use connect = auto or tunnel"
            )
        return Selection(launch.tunnelled(words))

    async def _direct(self, launch: KernelLaunch, launcher: Launcher, kernel_id: str, kept: Where | None) -> Selection:
        """Raises _CannotDial."""
        asked = launch.mode == "direct"
        if not launcher.probes:
            if not asked:
                raise _CannotDial(f"was not dialled: {OLDER}")
            why = f"connect = direct; node {launcher.node} was not dialled: {OLDER}"
            return Selection(launch.direct(_and(why, launch.why)), _address(launcher), kept and kept[1])
        ip, ports = kept or (_address(launcher), None)
        if not asked:
            self._check_memory(ip)
        ports = await self._reach(launch, launcher, kernel_id, ip, ports)
        self._silent.pop(ip, None)
        words = f"node {launcher.node} can be dialled at {ip}"
        why = f"connect = direct, and {words}" if asked else words
        return Selection(launch.direct(_and(why, launch.why)), ip, ports)

    async def _reach(
        self, launch: KernelLaunch, launcher: Launcher, kernel_id: str, ip: str, kept: dict[str, int] | None
    ) -> dict[str, int]:
        """Return the ports that the launcher held, once the answer has come from all of them."""
        words = {"question": secrets.token_hex(16), "answer": secrets.token_hex(16)}
        asked = {"kernel_id": kernel_id, "ip": ip, "ports": kept, "port_range": launch.port_range}
        try:
            told = await launcher.prober.ask(**asked, **words)
            if "error" in told:
                raise LinkError(f"its launcher cannot listen: {str(told['error'])[:200]}")
            ports = ports_of(told.get("ports"), launch.port_range)
        except LinkError as error:
            raise _CannotDial(f"was not dialled: {error}") from error
        failures = [failure for failure in await _dial_all(ip, ports, **words) if failure]
        if failures:
            why = f"could not be dialled at {failures[0]}"
            if any(failure.endswith(TIMED_OUT) for failure in failures):
                self._remember(ip, why)
            raise _CannotDial(why)
        return ports

    # -- nodes that did not answer ------------------------------------------------------------------

    def _check_memory(self, ip: str) -> None:
        silent = self._silent.get(ip)
        seconds = silent.until - _now() if silent is not None else 0
        if silent is not None and seconds > 0:
            raise _CannotDial(f"{silent.words} (a while ago; it is tried again in {seconds:.0f} s)")

    def _remember(self, ip: str, words: str) -> None:
        known = self._silent.pop(ip, None)
        pause = min(2 * known.pause, REMEMBER_LONGEST) if known is not None else REMEMBER_SECONDS
        while len(self._silent) >= REMEMBER_NODES:
            del self._silent[next(iter(self._silent))]
        self._silent[ip] = _Silent(words, _now() + pause, pause)


def _and(why: str, cost: str) -> str:
    return f"{why}; {cost}" if cost else why


def _now() -> float:
    return time.monotonic()


def _address(launcher: Launcher) -> str:
    """Where the launcher's link comes from, if that is the node's own address, of a kind that clients dial."""
    came_from, own = _plain(launcher.peer), _plain(launcher.own_ip)
    if came_from is None or own is None:
        raise _CannotDial("was not dialled: the address that its launcher comes from is not known")
    if came_from != own:
        raise _CannotDial(
            f"was not dialled: its launcher comes from {came_from}, and its own address is {own}: between here and "
            "there addresses are translated, or connections forwarded"
        )
    if came_from.version != 4:
        raise _CannotDial(f"was not dialled: Jupyter's clients dial IPv4 addresses only, and it has {came_from}")
    return str(came_from)


def _plain(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address; an IPv4 one that a socket for both has shown as ``::ffff:…`` as what it is."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return (address.ipv4_mapped or address) if isinstance(address, ipaddress.IPv6Address) else address


# -- dialling -------------------------------------------------------------------------------------

TIMED_OUT: Final = "timed out"


async def _dial_all(ip: str, ports: dict[str, int], *, question: str, answer: str) -> list[str]:
    """Dial all ports at once; of each why it is not the launcher's, or ""."""
    return await asyncio.gather(*(_dial(ip, port, question.encode(), answer.encode()) for port in ports.values()))


async def _connect(ip: str, port: int) -> str:
    """Dial one port and hang up; why it cannot be dialled, or ""."""
    try:
        (await _open(ip, port, 1))[1].transport.abort()
    except _CannotDial as error:
        return str(error)
    return ""


async def _open(ip: str, port: int, limit: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Raises _CannotDial."""
    where = f"{ip}:{port}"
    try:
        opened: tuple[asyncio.StreamReader, asyncio.StreamWriter] = await _in_time(
            asyncio.open_connection(ip, port, limit=limit), CONNECT_SECONDS
        )
    except asyncio.TimeoutError as error:
        raise _CannotDial(f"{where}: {TIMED_OUT}") from error
    except OSError as error:
        raise _CannotDial(f"{where}: {os.strerror(error.errno) if error.errno else error}") from error
    return opened


async def _dial(ip: str, port: int, question: bytes, answer: bytes) -> str:
    where = f"{ip}:{port}"
    try:
        reader, writer = await _open(ip, port, len(answer))
    except _CannotDial as error:
        return str(error)
    try:
        writer.write(question)
        told = await _in_time(reader.readexactly(len(answer)), WORD_SECONDS)
    except (asyncio.TimeoutError, asyncio.IncompleteReadError, OSError):
        told = b""
    finally:
        writer.transport.abort()
    return "" if wire.same(told, answer) else f"{where}: something else than its launcher listens there"


async def _in_time(coroutine: Any, seconds: float) -> Any:
    """The result. Raises TimeoutError after ``seconds``, unless it was there before this loop came to look."""
    task = asyncio.ensure_future(coroutine)
    try:
        for each in (seconds, SLACK_SECONDS):
            if (await asyncio.wait({task}, timeout=each))[0]:
                return task.result()
        raise asyncio.TimeoutError
    finally:
        task.cancel()
