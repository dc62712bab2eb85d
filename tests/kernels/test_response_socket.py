"""The response socket against peers that are silent, noisy, late, lying or replayed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import struct
from collections.abc import AsyncIterator
from typing import Any

import pytest

from gateway_slurm.link import server, wire
from gateway_slurm.link import server as lookups
from helpers.kernel_clients import poll_async
from helpers.raw_links import LauncherEnd, RecordingHandler, connect, draw_tokens

LOG = logging.getLogger("test.link")


class Store:
    """The response socket's questions about launchers that it does not expect."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.answer: Any = False
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def look_up(self, launcher_id: str) -> Any:
        self.asked.append(launcher_id)
        await self.may_answer.wait()
        return self.answer() if callable(self.answer) else self.answer


@pytest.fixture
async def store() -> Store:
    """Answers that no launcher is known, until a test says else."""
    return Store()


@pytest.fixture
async def socket(store) -> AsyncIterator[server.ResponseSocket]:
    """A listening response socket."""
    response_socket = server.ResponseSocket(log=LOG, resolve=store.look_up)
    await response_socket.listen(["127.0.0.1"], range(1))
    yield response_socket
    await response_socket.close()


def expect(socket: server.ResponseSocket, launcher_id: str = "L1", jobid: str = "12") -> tuple[RecordingHandler, bytes]:
    """Let a launcher in; return its launch token."""
    handler, tokens = RecordingHandler(), draw_tokens()
    socket.expect(launcher_id, tokens, handler).jobid.set_result(jobid)
    return handler, tokens[0]


async def test_a_launcher_with_its_token_is_welcomed(socket):
    """HELLO under the launch token is answered by WELCOME with the next token."""
    handler, token = expect(socket)
    peer = await connect(socket, token)
    peer.writer.write(wire.frame(peer.report()))
    assert (await handler.until("message"))[1:] == ("REPORT", {"kernels": []})
    assert peer.token != token


async def test_both_tokens_open_the_door_until_the_new_one_is_acknowledged(socket):
    """A link that breaks before REPORT does not lock the launcher out; after REPORT the old token is dead."""
    handler, token = expect(socket)
    first = await connect(socket, token)
    first.writer.close()
    second = await connect(socket, token)
    second.writer.write(wire.frame(second.report()))
    await handler.until("message")
    late = await LauncherEnd.dial(socket.port)
    late.writer.write(late.hello("L1", token, "12"))
    assert await late.is_closed()
    await connect(socket, second.token)


async def test_a_replayed_hello_is_answered_by_nothing(socket):
    """The bytes of a good HELLO on another connection open nothing: each connection has its own key."""
    _handler, token = expect(socket)
    good = await LauncherEnd.dial(socket.port)
    recorded = good.hello("L1", token, "12")
    good.writer.write(recorded)
    assert (await good.message())[0] == "WELCOME"
    replay = await LauncherEnd.dial(socket.port)
    replay.writer.write(recorded)
    assert await replay.is_closed()
    # The live link did not notice.
    good.writer.write(wire.frame(good.report()))
    await _handler.until("message")


@pytest.mark.parametrize(
    ("launcher_id", "right_token", "jobid"),
    [("L1", False, "12"), ("L1", True, "123"), ("nobody", True, "12"), ("L1", True, "")],
    ids=["wrong token", "wrong jobid", "unknown launcher", "no jobid"],
)
async def test_who_cannot_prove_itself_is_closed_without_a_word(socket, launcher_id, right_token, jobid):
    """A wrong token, or the right one with another job's id, gets no answer, and the launcher itself still gets in."""
    _handler, token = expect(socket)
    liar = await LauncherEnd.dial(socket.port)
    liar.writer.write(liar.hello(launcher_id, token if right_token else os.urandom(32), jobid))
    assert await liar.is_closed()
    await connect(socket, token)


async def test_of_two_links_the_newest_wins(socket):
    """A launcher that dials again while its old link looks alive replaces it."""
    _handler, token = expect(socket)
    old = await connect(socket, token)
    await connect(socket, old.token)
    assert await old.is_closed()


@pytest.mark.parametrize(
    "noise",
    [b"GET / HTTP/1.1\r\n\r\n", bytes(1_000_000), b"\xff" * 64, struct.pack(">I", 20) + b"x" * 20, b"\0\0\0\0"],
    ids=["http", "a megabyte of zeros", "a huge length", "a frame of x", "an empty frame"],
)
async def test_garbage_ends_its_own_connection_only(socket, noise):
    """Whatever a stranger sends, it is cut off, and a launcher's link beside it works on."""
    handler, token = expect(socket)
    good = await connect(socket, token)
    stranger = await LauncherEnd.dial(socket.port)
    with contextlib.suppress(ConnectionError):
        stranger.writer.write(noise)
        await stranger.writer.drain()
    assert await stranger.is_closed()
    good.writer.write(wire.frame(good.report()))
    await handler.until("message")


async def test_a_silent_peer_is_cut_off_at_the_deadline(socket, monkeypatch):
    """Saying nothing is no way to keep a place."""
    monkeypatch.setattr(server, "HANDSHAKE_SECONDS", 0.3)
    silent = await LauncherEnd.dial(socket.port)
    assert await silent.is_closed()


async def test_500_silent_connections_do_not_keep_a_launcher_out(socket):
    """Places for strangers are bounded, and the oldest gives way."""
    _handler, token = expect(socket)
    crowd = await asyncio.gather(*(asyncio.open_connection("127.0.0.1", socket.port) for _ in range(500)))
    await asyncio.wait_for(connect(socket, token), 10)
    assert len(socket._unauthenticated) <= server.UNAUTHENTICATED_PLACES
    for _reader, writer in crowd:
        writer.close()


async def test_a_hello_before_sbatch_has_answered_waits_for_the_jobid(socket):
    """A job may start before its id is known here."""
    handler, tokens = RecordingHandler(), draw_tokens()
    expected = socket.expect("L1", tokens, handler)
    peer = await LauncherEnd.dial(socket.port)
    peer.writer.write(peer.hello("L1", tokens[0], "12"))
    await asyncio.wait({asyncio.ensure_future(peer.reader.read(1))}, timeout=0.1)
    assert handler.events == []
    expected.jobid.set_result("12")
    await handler.until("up")


async def test_a_hello_cut_anywhere_and_continued_is_still_a_hello(socket):
    """TCP may deliver the opening in any pieces."""
    handler, token = expect(socket)
    peer = await LauncherEnd.dial(socket.port)
    for byte in peer.hello("L1", token, "12"):
        peer.writer.write(bytes([byte]))
        await peer.writer.drain()
    await handler.until("up")


async def test_a_link_cut_inside_a_frame_goes_down_and_may_come_again(socket):
    """Half a frame is no message; the next link starts afresh."""
    handler, token = expect(socket)
    peer = await connect(socket, token)
    whole = wire.frame(peer.report())
    peer.writer.write(whole[: len(whole) // 2])
    await peer.writer.drain()
    peer.writer.close()
    await handler.until("down")
    assert not [event for event in handler.events if event[0] == "message"]
    await connect(socket, peer.token)


async def test_a_forged_frame_ends_the_link(socket):
    """A frame that the link's key does not open is not the launcher's."""
    handler, token = expect(socket)
    peer = await connect(socket, token)
    peer.writer.write(wire.frame(b"\0" * 64))
    assert "does not open" in (await handler.until("down"))[1]


async def test_a_complaint_under_the_token_is_believed_and_one_without_is_not(socket):
    """A launcher without pycryptodome can still say so, and no other process can in its name."""
    handler, token = expect(socket)
    for key in (os.urandom(32), token):
        peer = await LauncherEnd.dial(socket.port)
        tag = wire.complaint_tag(key, peer.public_key, "L1", "12", "no pycryptodome")
        peer.writer.write(wire.frame(wire.Opening(wire.COMPLAINT, "L1", "12", tag, "no pycryptodome").encode()))
        assert await peer.is_closed()
    assert handler.events == [("complained", "no pycryptodome")]


async def test_the_successor_is_the_same_at_every_link(socket):
    """A launcher's tokens are those that were drawn with it, so that any server with its record can let it in."""
    handler, tokens = RecordingHandler(), draw_tokens()
    socket.expect("L1", tokens, handler).jobid.set_result("12")
    first = await connect(socket, tokens[0])
    first.writer.write(wire.frame(first.report()))
    await handler.until("message")
    second = await connect(socket, first.token)
    assert [first.token, second.token] == [tokens[1]] * 2


def claimed_at_leisure(socket, store):
    """Handler and tokens of L1, which no start expects: it is ours once it was looked up and ``may_answer`` is set."""
    handler, tokens = RecordingHandler(), draw_tokens()

    def claim() -> bool:
        socket.expect("L1", tokens, handler).jobid.set_result("12")
        return True

    store.answer = claim
    store.may_answer.clear()
    return handler, tokens


async def test_another_server_lets_the_launcher_in_by_its_record(socket, store):
    """An unexpected launcher is looked up once, however many connections it has, and served if it is ours now."""
    handler, tokens = claimed_at_leisure(socket, store)
    peers = [await LauncherEnd.dial(socket.port) for _ in range(3)]
    for peer in peers:
        peer.writer.write(peer.hello("L1", tokens[1], "12"))
    assert await poll_async(lambda: store.asked, timeout=10)
    store.may_answer.set()
    await handler.until("up")
    assert store.asked == ["L1"]


async def test_a_launcher_of_another_server_is_told_where_that_is(socket, store):
    """It gets the owner's addresses in place of WELCOME, and this connection ends."""
    tokens = draw_tokens()
    store.answer = server.Redirect(tokens, "12", ["192.0.2.1:77"], 3)
    peer = await LauncherEnd.dial(socket.port)
    peer.writer.write(peer.hello("L1", tokens[1], "12"))
    assert await peer.message() == ("REDIRECT", {"addresses": ["192.0.2.1:77"], "epoch": 3})
    assert await peer.is_closed()


@pytest.mark.parametrize("jobid", ["12", "13"])
async def test_only_the_launcher_itself_is_told(socket, store, jobid):
    """A client without the launcher's tokens, or of another job, learns nothing."""
    tokens = draw_tokens()
    store.answer = server.Redirect(tokens, "12", ["192.0.2.1:77"], 3)
    peer = await LauncherEnd.dial(socket.port)
    peer.writer.write(peer.hello("L1", os.urandom(32) if jobid == "12" else tokens[0], jobid))
    assert await peer.is_closed()


async def test_a_store_that_fails_ends_that_connection_only(socket, store):
    """Its trouble keeps no expected launcher out, and is no answer to a stranger."""

    def fail() -> bool:
        raise OSError("no space left on device")

    _handler, token = expect(socket)
    store.answer = fail
    peer = await LauncherEnd.dial(socket.port)
    peer.writer.write(peer.hello("L2", os.urandom(32), "12"))
    assert await peer.is_closed()
    await connect(socket, token)


async def test_a_store_that_does_not_answer_holds_a_bounded_number_of_lookups(socket, store, monkeypatch):
    """Unknown names cost a bounded number of questions at a time, each with its deadline; others get in."""
    monkeypatch.setattr(server, "HANDSHAKE_SECONDS", 1.0)
    _handler, token = expect(socket)
    store.may_answer.clear()
    peers = [await LauncherEnd.dial(socket.port) for _ in range(40)]
    for number, peer in enumerate(peers):
        peer.writer.write(peer.hello(f"L-{number}", os.urandom(32), "12"))
    await connect(socket, token)
    assert await poll_async(lambda: len(store.asked) == lookups.MAX_LOOKUPS, timeout=10)
    assert all([await peer.is_closed() for peer in peers])
    store.may_answer.set()
    assert await poll_async(lambda: len(socket._lookups) == 0, timeout=10)


async def test_peers_that_are_gone_leave_no_lookups_behind(socket, store):
    """Only what has begun goes on; a launcher that dials then is asked about next."""
    store.may_answer.clear()
    peers = [await LauncherEnd.dial(socket.port) for _ in range(40)]
    for number, peer in enumerate(peers):
        peer.writer.write(peer.hello(f"L-{number}", os.urandom(32), "12"))
    assert await poll_async(lambda: len(socket._lookups) == 40, timeout=10)
    for peer in peers:
        peer.writer.close()
    assert await poll_async(lambda: len(socket._lookups) == lookups.MAX_LOOKUPS, timeout=server.HANDSHAKE_SECONDS - 2)
    late = await LauncherEnd.dial(socket.port)
    late.writer.write(late.hello("late", os.urandom(32), "12"))
    store.may_answer.set()
    assert await poll_async(lambda: len(socket._lookups) == 0, timeout=10)
    assert await late.is_closed()
    assert store.asked[lookups.MAX_LOOKUPS :] == ["late"]


async def test_one_of_two_peers_that_goes_takes_no_answer_from_the_other(socket, store):
    """Two connections may say the same id."""
    _handler, tokens = claimed_at_leisure(socket, store)
    gone, stays = [await LauncherEnd.dial(socket.port) for _ in range(2)]
    for peer in (gone, stays):
        peer.writer.write(peer.hello("L1", tokens[0], "12"))
    assert await poll_async(lambda: [each.peers for each in socket._lookups._lookups.values()] == [2], timeout=10)
    gone.writer.close()
    assert await poll_async(lambda: [each.peers for each in socket._lookups._lookups.values()] == [1], timeout=10)
    store.may_answer.set()
    assert (await stays.message())[0] == "WELCOME"
    assert store.asked == ["L1"]


async def test_a_bounded_number_of_launchers_is_looked_up(socket, store):
    """A launcher that comes when that many are pending is turned away, and dials again."""
    socket._lookups._limit = 10
    store.may_answer.clear()
    peers = [await LauncherEnd.dial(socket.port) for _ in range(11)]
    for number, peer in enumerate(peers):
        peer.writer.write(peer.hello(f"L-{number}", os.urandom(32), "12"))
    assert await poll_async(lambda: len(socket._unauthenticated) == 10, timeout=server.HANDSHAKE_SECONDS - 2)
    assert len(socket._lookups) == 10
    store.may_answer.set()


async def test_a_name_that_is_no_launchers_is_not_looked_up(socket, store):
    """What a stranger writes there reaches no store."""
    peer = await LauncherEnd.dial(socket.port)
    peer.writer.write(peer.hello("'; drop table launchers", os.urandom(32), "12"))
    assert await peer.is_closed()
    assert store.asked == []


async def test_a_server_takes_over_the_port_of_one_that_is_gone(socket, store):
    """Launchers that know only the old address reach the new server there."""
    old = server.ResponseSocket(log=LOG)
    await old.listen(["127.0.0.1"], range(1))
    port = old.port
    await old.close()
    await socket.also_listen(["127.0.0.1"], port)
    _handler, token = expect(socket)
    peer = await LauncherEnd.dial(port)
    peer.writer.write(peer.hello("L1", token, "12"))
    assert (await peer.message())[0] == "WELCOME"
    with pytest.raises(OSError, match="in use"):
        await socket.also_listen(["127.0.0.1"], port)
