"""Broken links, a Slurm that does not answer meanwhile, and strangers at the response socket."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
from jupyter_client import BlockingKernelClient

from gateway_slurm.errors import HandshakeError, LinkError
from gateway_slurm.kernels.model import Phase
from gateway_slurm.link import wire
from gateway_slurm.service import SlurmService
from helpers.failing_starts import cut_links, on_loop, script
from helpers.kernel_clients import PID, READY, execute, process_of, running_kernel, until_reply
from helpers.private_slurm import poll, slurm

FAKE = """#!/bin/sh
mode=$(cat {mode})
echo "$mode" >> {asked}
case $mode in
  fails) echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1 ;;
  dies) exit 139 ;;
  hangs) exec sleep 600 ;;
  rubbish) echo 'CANCELLED|FAILED 12 COMPLETED'; exit 0 ;;
esac
exec {squeue} "$@"
"""


class FakeSqueue:
    """Slurm's commands with a squeue before them that the test controls."""

    def __init__(self, directory: Path) -> None:
        self._mode = directory / "mode"
        self.asked = directory / "asked"
        self.asked.touch()
        self.tell("works")
        text = FAKE.format(mode=self._mode, asked=self.asked, squeue=shutil.which("squeue"))
        (directory / "bin").mkdir()
        script(directory / "bin" / "squeue", text)
        self.path = f"{directory / 'bin'}:{os.environ['PATH']}"

    def tell(self, mode: str) -> None:
        self._mode.write_text(mode)

    def count(self, mode: str) -> int:
        return self.asked.read_text().split().count(mode)


def phases_of(manager):
    """The phases that the kernel enters from now on."""
    process, phases = process_of(manager), []
    original = process._enter

    def enter(phase):
        original(phase)
        phases.append(phase)

    process._enter = enter
    return phases


@contextlib.contextmanager
def no_way_back():
    """While inside, the response socket turns every launcher away; outside it is open again."""
    response_socket = SlurmService.instance()._socket

    async def refuse(*_arguments):
        raise HandshakeError("the test wants no link now")

    response_socket.authenticate = refuse
    try:
        yield
    finally:
        del response_socket.authenticate


def test_a_link_that_breaks_comes_back(service, kernel_name, cluster):
    """After a cut the kernel is LOST, then RUNNING again; its memory and the client's channels are there."""
    with running_kernel(kernel_name) as (manager, client):
        execute(client, "kept = 12")
        pid, phases = execute(client, PID), phases_of(manager)
        assert cut_links() == 1
        assert poll(lambda: phases == [Phase.LOST, Phase.RUNNING], timeout=20)
        assert manager.is_alive()
        assert execute(client, "print(kept)") == "12"
        assert execute(client, PID) == pid


def test_a_link_that_breaks_again_and_again_comes_back(service, kernel_name):
    """Ten cuts, some in the middle of the handshake, lose no kernel."""
    with running_kernel(kernel_name) as (manager, client):
        execute(client, "kept = 13")
        for pause in (0, 0, 0.01, 0.02, 0.05, 0.1, 0.1, 0.2, 0.3, 0.3):
            cut_links()
            time.sleep(pause)
        assert poll(lambda: process_of(manager).phase is Phase.RUNNING, timeout=20)
        assert execute(client, "print(kept)") == "13"


def test_a_cut_during_output_loses_no_kernel(service, kernel_name):
    """A link that breaks while the kernel prints without end is there again, and so is the kernel."""
    flood = "import time\nend = time.time() + 2\nwhile time.time() < end: print('x' * 20000)"
    with running_kernel(kernel_name) as (manager, client):
        client.execute(flood)
        for _ in range(3):
            time.sleep(0.4)
            cut_links()
        assert poll(lambda: process_of(manager).phase is Phase.RUNNING, timeout=20)
        assert manager.is_alive()
        assert execute(client, "print('well')") == "well"


# -- what goes through the tunnel meanwhile -------------------------------------------------------


def connections_of(manager):
    """The clients' connections to a tunnelled kernel, as they are now."""
    return set(process_of(manager)._tunnel.clients)


def lines_until_idle(client, msg_id, *, on_line=lambda _count: None):
    """What a cell printed, line by line, until the kernel said that it is done; ``on_line`` gets their number."""
    texts, count = [], 0
    while True:
        message = client.get_iopub_msg(timeout=READY)
        if message["parent_header"].get("msg_id") != msg_id:
            continue
        if message["msg_type"] == "stream":
            texts.append(message["content"]["text"])
            count += texts[-1].count("\n")
            on_line(count)
        elif message["content"].get("execution_state") == "idle":
            return "".join(texts).splitlines()


NUMBERS = """
import os, time
while not os.path.exists({go!r}): time.sleep(0.01)
for number in range(20_000): print(number, 'x' * 300, flush=number % 1000 == 999)
open({done!r}, 'w').close()
"""
ON_AND_ON = """
import os, time
number = 0
while not os.path.exists({path!r}):
    print(number, 'x' * 300)
    number += 1
    if number % 10 == 0: time.sleep(0.001)
"""


def numbers(count):
    """What the cells print."""
    return [f"{number} {'x' * 300}" for number in range(count)]


def leave_links_half_open():
    """Let launchers take their links for ended while the server still takes them for alive."""

    def half_close():
        for link in list(SlurmService.instance()._socket._links):
            link._transport.pause_reading()
            link.pause_writing()  # a write would find out
            link._transport.get_extra_info("socket").shutdown(socket.SHUT_WR)

    on_loop(half_close)


@pytest.mark.parametrize(
    ("break_links", "told"),
    [(cut_links, "the launcher closed it"), (leave_links_half_open, "a newer link of the same launcher")],
    ids=["cut", "half-open"],
)
def test_every_line_comes_once_through_links_that_break(service, tmp_path, caplog, break_links, told):
    """A client that stays connected gets all of a kernel's output in order, over five links."""
    with running_kernel("slurm") as (manager, client):
        connections, path = connections_of(manager), tmp_path / "stop"
        launcher, broken = process_of(manager).launcher, {None: 0}

        def break_again(count):
            link = launcher.link
            if link in broken or count < max(broken.values()) + 3000:
                return
            broken[link] = count
            if len(broken) <= 5:  # None is among them
                break_links()
            else:
                path.touch()

        msg_id = client.execute(ON_AND_ON.format(path=str(path)))
        lines = lines_until_idle(client, msg_id, on_line=break_again)
        assert lines == numbers(len(lines))
        assert caplog.text.count("the link is down") == 4
        assert told in caplog.text
        assert until_reply(client, msg_id)["content"]["status"] == "ok"
        assert execute(client, "print('well')") == "well"
        assert connections <= connections_of(manager)


def test_a_cell_that_prints_and_ends_while_there_is_no_link_is_seen_whole(service, tmp_path):
    """More output than a window, and the cell's end, come with the next link."""
    go, done = tmp_path / "go", tmp_path / "done"
    with running_kernel("slurm") as (manager, client):
        msg_id = client.execute(NUMBERS.format(go=str(go), done=str(done)))
        while client.get_iopub_msg(timeout=READY)["msg_type"] != "execute_input":
            pass
        with no_way_back():
            cut_links()
            assert poll(lambda: process_of(manager).phase is Phase.LOST, timeout=5)
            go.touch()
            assert poll(done.exists, timeout=READY)
        assert lines_until_idle(client, msg_id) == numbers(20_000)
        assert until_reply(client, msg_id)["content"]["status"] == "ok"


def test_what_is_executed_while_there_is_no_link_is_executed_once(service):
    """A request that is sent to a kernel out of reach is answered when it is back, with all its output."""
    with running_kernel("slurm") as (manager, client):
        execute(client, "runs = []")
        with no_way_back():
            cut_links()
            assert poll(lambda: process_of(manager).phase is Phase.LOST, timeout=5)
            msg_id = client.execute("runs.append(1); print('run', len(runs))")
        assert lines_until_idle(client, msg_id) == ["run 1"]
        assert until_reply(client, msg_id)["content"]["status"] == "ok"
        assert execute(client, "print(len(runs))") == "1"


def test_a_client_that_comes_while_there_is_no_link_waits(service):
    """It is connected, not turned away, and works when the link is back."""
    with running_kernel("slurm") as (manager, client):
        late = BlockingKernelClient(connection_file=manager.connection_file)
        late.load_connection_file()
        with no_way_back():
            cut_links()
            assert poll(lambda: process_of(manager).phase is Phase.LOST, timeout=5)
            before = connections_of(manager)
            late.start_channels(hb=False)
            assert poll(lambda: len(connections_of(manager) - before) >= 4, timeout=10)
            late.execute("came = 1")
        late.wait_for_ready(timeout=READY)
        assert execute(client, "print(came)") == "1"
        late.stop_channels()


def test_connections_to_a_kernel_that_died_meanwhile_are_closed(service):
    """A kernel that ends while the link is down leaves no client waiting; started again it is there for them.

    Only iopub stays: it comes from the launcher's journal, which goes on with the next process.
    """
    with running_kernel("slurm") as (manager, client):
        connections = {connection for connection in connections_of(manager) if connection._channel != "iopub"}
        with no_way_back():
            cut_links()
            assert poll(lambda: process_of(manager).phase is Phase.LOST, timeout=5)
            os.kill(process_of(manager).pid, signal.SIGKILL)
        assert poll(lambda: not manager.is_alive(), timeout=20)
        assert poll(lambda: not connections & connections_of(manager), timeout=10)
        manager.restart_kernel(now=True)
        client.wait_for_ready(timeout=READY)
        assert execute(client, "print(1)") == "1"


# -- a Slurm that does not answer meanwhile --------------------------------------------------------


@pytest.mark.parametrize("trouble", ["fails", "dies", "hangs", "rubbish"])
def test_a_lost_kernel_is_not_declared_dead_by_a_squeue_that_fails(admin_settings, cluster, tmp_path, trouble):
    """While the link is gone and squeue fails, hangs or prints rubbish, nothing is known, and nothing dies."""
    fake = FakeSqueue(tmp_path)
    admin_settings(slurm_path=fake.path, watch_interval=0.1, command_timeout=0.5)
    with running_kernel("slurm") as (manager, client):
        execute(client, "kept = 14")
        fake.tell(trouble)
        with no_way_back():
            cut_links()
            assert poll(lambda: fake.count(trouble) >= 3, timeout=20)
            assert manager.is_alive()
            assert process_of(manager).phase is Phase.LOST
        assert poll(lambda: process_of(manager).phase is Phase.RUNNING, timeout=20)
        fake.tell("works")
        assert execute(client, "print(kept)") == "14"


def test_an_interrupt_that_cannot_be_delivered_says_so(service, kernel_name):
    """Interrupting a kernel whose link is down is an error that names launcher and job; shutdown is none."""
    with running_kernel(kernel_name) as (manager, _client):
        job = manager.provisioner.jobid
        with no_way_back():
            cut_links()
            assert poll(lambda: process_of(manager).phase is Phase.LOST, timeout=5)
            with pytest.raises(LinkError, match=rf"(?s)link.*job {job}.*down"):
                manager.interrupt_kernel()
            assert manager.is_alive()


def test_a_kernel_that_is_out_of_reach_can_be_shut_down(service, cluster):
    """Shutting down while the link is down ends the job by scancel, and returns."""
    with running_kernel("slurm") as (manager, _client), no_way_back():
        cut_links()
        assert poll(lambda: process_of(manager).phase is Phase.LOST, timeout=5)
        began = time.monotonic()
        manager.shutdown_kernel(now=True)
        assert time.monotonic() - began < 20
        assert not manager.has_kernel


def test_a_job_that_ends_while_the_link_is_down_is_told(admin_settings, cluster):
    """Out of reach or not, when Slurm says that the job is over the kernel is dead."""
    admin_settings(watch_interval=0.2)
    with running_kernel("slurm") as (manager, _client), no_way_back():
        connections = connections_of(manager)
        cut_links()
        assert manager.is_alive()
        slurm("scancel", manager.provisioner.jobid, cluster=cluster)
        assert poll(lambda: not manager.is_alive(), timeout=20)
        assert "CANCELLED" in manager.provisioner.exit_reason
        assert poll(lambda: not connections & connections_of(manager), timeout=10)


# -- strangers ------------------------------------------------------------------------------------


def strangers(port, stop, hello):
    """Everything that the network may bring to an open port, all at once, until told to stop."""

    async def noise(data, *, hold):
        while not stop.is_set():
            try:
                _reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(data)
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(stop_in_loop.wait(), hold)
                writer.close()
            except OSError:
                await asyncio.sleep(0.05)

    async def main():
        global_kinds = [
            (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", 0.2),
            (os.urandom(4096), 0.2),
            (bytes(1 << 20), 0.5),
            (b"\xff" * 64, 0.2),
            (hello, 0.2),
        ]
        noises = [noise(data, hold=hold) for data, hold in global_kinds]
        silent = [noise(b"", hold=10) for _ in range(500)]
        await asyncio.gather(*noises, *silent, watch())

    async def watch():
        await asyncio.to_thread(stop.wait)
        stop_in_loop.set()

    stop_in_loop = asyncio.Event()
    asyncio.run(main())


@pytest.fixture
def besieged(service, cluster):
    """The response socket of the live service, with a hostile network at its door."""
    on_loop(lambda: None)
    service.submit(service.open()).result(timeout=10)
    # A HELLO as it went over the wire once, for a launcher that is not expected (any more).
    old = wire.frame(wire.Opening(wire.HELLO, "gs-0123456789abcdef", "1", os.urandom(200)).encode())
    stop = threading.Event()
    thread = threading.Thread(target=strangers, args=(service._socket.port, stop, old), daemon=True)
    thread.start()
    yield service
    stop.set()
    thread.join(timeout=30)
    assert not thread.is_alive()


def test_kernels_start_and_run_under_siege(besieged, kernel_name):
    """Garbage, zeros, silence, 500 connections and old HELLOs stop no start, cell, interrupt or restart."""
    with running_kernel(kernel_name) as (manager, client):
        assert execute(client, "print(6 * 7)") == "42"
        waiting = client.execute("import time; print('begun', flush=True); time.sleep(600)")
        while "begun" not in str(client.get_iopub_msg(timeout=READY)["content"].get("text")):
            pass
        manager.interrupt_kernel()
        assert until_reply(client, waiting)["content"]["ename"] == "KeyboardInterrupt"
        manager.restart_kernel()
        client.wait_for_ready(timeout=READY)
        assert execute(client, "print(6 * 8)") == "48"
        cut_links()
        assert execute(client, "print(6 * 9)") == "54"


def test_a_recorded_hello_admits_no_launcher(service, kernel_name):
    """A launcher's HELLO that another process sends again changes nothing."""
    recorded = []
    with running_kernel(kernel_name) as (manager, client):
        take = wire.Opening.decode

        def record(frame):
            recorded.append(bytes(frame))
            return take(frame)

        wire.Opening.decode = record
        try:
            cut_links()
            assert poll(lambda: recorded and process_of(manager).phase is Phase.RUNNING, timeout=20)
        finally:
            wire.Opening.decode = take
        link = process_of(manager).launcher.link
        with socket.create_connection(("127.0.0.1", service._socket.port)) as peer:
            peer.settimeout(10)
            peer.recv(wire.PREAMBLE_BYTES)
            peer.sendall(wire.frame(recorded[0]))
            assert peer.recv(1) == b""
        assert process_of(manager).launcher.link is link
        assert execute(client, "print(1)") == "1"
