"""What a gateway finds in the store of what the others of its deployment have."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from gateway_slurm.errors import StoreUnavailable
from gateway_slurm.gateway.peers import directory as peer_directory
from gateway_slurm.gateway.peers.directory import DirectoryUnavailable, StoreDirectory
from gateway_slurm.store import AllocationRecord, KernelRecord, Registry, SessionRecord

KERNEL = "11111111-1111-1111-1111-111111111111"
STARTING = "22222222-2222-2222-2222-222222222222"
SESSION = "33333333-3333-3333-3333-333333333333"


def service_of(registry, deployment="gateway", *, is_open=True):
    """What a service has that is open."""
    return SimpleNamespace(registry=registry, deployment=deployment, is_open=is_open)


@pytest.fixture
def registries(tmp_path):
    """Two gateways of one deployment, and a Jupyter server that has a deployment of its own."""
    made = [Registry(tmp_path, deployment=name) for name in ("gateway", "gateway", "server-8888")]
    for registry in made:
        registry.open()
    yield made
    for registry in made:
        registry.close()


@pytest.fixture
def other(registries):
    """The other gateway: a kernel of alice's that runs, with a session, and one of bob's that starts."""
    registry = registries[1]
    registry.announce(url="http://127.0.0.1:1234/")
    registry.put(AllocationRecord(launcher_id="l1", jobid="1", owner="alice", kernel_ids=[KERNEL]))
    registry.put(AllocationRecord(launcher_id="l2", jobid="2", owner="bob", kernel_ids=[STARTING]))
    manager = {"kernel_name": "physics.python", "maker": "portal"}
    registry.put(
        KernelRecord(
            kernel_id=KERNEL,
            launcher_id="l1",
            record_key="l1",
            owner="alice",
            node="c1",
            started_at=5.0,
            manager=manager,
        )
    )
    registry.put(
        SessionRecord(
            session_id=SESSION, owner="alice", kernel_id=KERNEL, path="a ä.ipynb", name="a ä.ipynb", type="notebook"
        )
    )
    registry.flush()
    return registry


@pytest.fixture
def directory(registries, other):
    """As the first gateway looks it up."""
    made = StoreDirectory(service_of(registries[0]))
    yield made
    made.close()


async def test_a_kernel_a_session_and_a_document_are_the_other_gateways(directory, other):
    """With its address and their owner; a kernel that still starts, too."""
    for found in (
        await directory.kernel(KERNEL),
        await directory.session(SESSION),
        await directory.session_at("alice", "a ä.ipynb"),
    ):
        assert (found.peer.server_id, found.peer.url, found.peer.lives) == (
            other.server_id,
            "http://127.0.0.1:1234/",
            True,
        )
        assert found.owner == "alice"
    assert (await directory.kernel(STARTING)).owner == "bob"
    assert await directory.owners() == {KERNEL: "alice", STARTING: "bob"}
    assert [peer.server_id for peer in await directory.others()] == [other.server_id]


async def test_what_no_server_has_is_not_found(directory, registries):
    """Nor what is another user's document, or of a server that is no gateway; what is one's own is said to be."""
    nobody = "44444444-4444-4444-4444-444444444444"
    assert await directory.kernel(nobody) is None
    assert await directory.kernel("%") is None
    assert await directory.session(nobody) is None
    assert await directory.session_at("bob", "a ä.ipynb") is None
    registries[2].put(KernelRecord(kernel_id=nobody, launcher_id="l3", record_key="l3"))
    await registries[2].flushed()
    assert await directory.kernel(nobody) is None
    own = "55555555-5555-5555-5555-555555555555"
    registries[0].put(KernelRecord(kernel_id=own, launcher_id="l4", record_key="l4", owner="alice"))
    registries[0].put(SessionRecord(session_id=own, owner="alice", kernel_id=own, path="own"))
    await registries[0].flushed()
    assert (await directory.kernel(own)).peer.server_id == directory.server_id
    assert own not in await directory.owners()
    assert await directory.session_at("alice", "own") is None


async def test_what_a_silent_gateway_has_is_told_from_the_store(directory, other):
    """As models that a client takes: the kernel's state is not known, and its time has the form that Jupyter reads."""
    kept = await directory.records_of([other.server_id])
    [(owner, maker, model)] = kept.kernels
    assert (owner, maker) == ("alice", "portal")
    assert (model["id"], model["name"], model["execution_state"]) == (KERNEL, "physics.python", "unknown")
    assert time.strptime(model["last_activity"].split(".")[0], "%Y-%m-%dT%H:%M:%S").tm_sec == 5
    assert (model["connections"], model["slurm"]["node"]) == (0, "c1")
    [(owner, maker, session)] = kept.sessions
    assert (owner, maker, session["kernel"]) == ("alice", "portal", model)
    assert session["notebook"] == {"path": "a ä.ipynb", "name": "a ä.ipynb"}


async def test_a_gateway_that_has_ended_is_dead_for_as_long_as_it_has_something(directory, other, registries):
    """Until another one has taken that."""
    other.close(leave=True)
    assert [(peer.server_id, peer.lives) for peer in await directory.others()] == [(other.server_id, False)]
    found = await directory.kernel(KERNEL)
    assert not found.peer.lives
    registries[0].claim()
    assert await directory.others() == []
    assert (await directory.kernel(KERNEL)).peer.server_id == directory.server_id


async def test_a_gateway_without_a_deployment_or_a_store_is_alone(registries, other):
    """Nothing is looked up."""
    for service in (service_of(registries[0], ""), service_of(registries[0], is_open=False)):
        directory = StoreDirectory(service)
        assert await directory.others() == []
        assert await directory.kernel(KERNEL) is None
        assert await directory.owners() == {}
        directory.close()


async def test_a_store_that_does_not_answer_is_said_to_be_away(directory, registries, monkeypatch):
    """Whether it answers with an error or hangs; no request waits for it for long."""

    def away(*_arguments):
        raise StoreUnavailable("it is away")

    monkeypatch.setattr(registries[0].store, "servers", away)
    with pytest.raises(DirectoryUnavailable, match="it is away"):
        await directory.others()
    monkeypatch.setattr(peer_directory, "ANSWER_SECONDS", 0.1)
    monkeypatch.setattr(registries[0].store, "servers", lambda: time.sleep(0.5))
    with pytest.raises(DirectoryUnavailable, match="not answered"):
        await directory.others()
