"""What is held for a user is counted, and what is over is refused or closed."""

from __future__ import annotations

import asyncio

from gateway_slurm.budget import FLOOR, Budget

MB = 1 << 20


def test_a_user_over_the_limit_is_refused_and_another_is_not() -> None:
    """A refusal names the setting; what was given back can be had again."""
    budget = Budget(10 * MB, 100 * MB)
    held = budget.holding("mallory", "held")
    assert held.try_add(9 * MB)
    assert not held.try_add(2 * MB)
    assert "memory_per_user is 10 MiB" in held.refusal()
    assert budget.holding("bob", "held").try_add(9 * MB)
    held.remove(5 * MB)
    assert held.try_add(2 * MB)
    held.close()
    assert budget.users() == {"bob": 9 * MB}
    assert budget.used() == 9 * MB
    assert budget.kinds()["held"] == 9 * MB


def test_the_largest_of_a_user_over_the_limit_is_closed() -> None:
    """Bytes that are there already are not refused: the largest thing that can go goes, once."""
    shed: list[str] = []

    async def scenario() -> None:
        budget = Budget(10 * MB, 100 * MB)
        budget.holding("mallory", "frontend", lambda _reason: shed.append("small")).add(3 * MB)
        large = budget.holding("mallory", "frontend", lambda _reason: shed.append("large"))
        large.add(6 * MB)
        other = budget.holding("mallory", "to_kernel")
        other.add(3 * MB)
        other.add(1 * MB)
        await asyncio.sleep(0)
        assert shed == ["large"]
        large.close()
        other.add(7 * MB)
        await asyncio.sleep(0)
        assert shed == ["large", "small"]
        assert budget.shed_count == {"frontend": 2}

    asyncio.run(scenario())


def test_over_the_servers_limit_the_user_with_most_pays_and_a_small_one_is_served() -> None:
    """Those who fill the server do not keep out those who need little."""
    shed: list[str] = []

    async def scenario() -> None:
        budget = Budget(60 * MB, 100 * MB)
        budget.holding("mallory", "window", shed.append).add(59 * MB)
        budget.holding("eve", "held").add(41 * MB)
        assert budget.holding("bob", "held").try_add(FLOOR)
        await asyncio.sleep(0)
        assert len(shed) == 1
        assert "memory_limit" in budget.reason("bob")

    asyncio.run(scenario())


def test_what_is_on_the_node_as_well_makes_room() -> None:
    """A cell is not refused for the sake of old output, and goes before a page that does not read."""
    shed: list[str] = []

    async def scenario() -> None:
        budget = Budget(10 * MB, 100 * MB)

        def clear(_reason: str) -> None:
            shed.append("window")
            window.set(0)

        window = budget.holding("alice", "window", clear)
        window.add(3 * MB)
        budget.holding("alice", "frontend", lambda _reason: shed.append("page")).add(6 * MB)
        held = budget.holding("alice", "held")
        assert not budget.has_room("alice", 5 * MB)
        assert not held.try_add(5 * MB)
        assert held.try_add(4 * MB)
        await asyncio.sleep(0)
        assert shed == ["window"]
        assert budget.used("alice") == 10 * MB

    asyncio.run(scenario())


def test_the_one_user_of_a_server_has_all_of_it() -> None:
    """The limit per user is for servers with several users; the server's own limit holds for all."""
    budget = Budget(10 * MB, 100 * MB)
    held = budget.holding("", "held")
    assert held.try_add(90 * MB)
    assert not held.try_add(20 * MB)
    assert "memory_limit is 100 MiB" in held.refusal()
