"""The watcher, with a fake Slurm; tests/slurm/test_driver.py runs it with a real one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Collection
from itertools import pairwise

import pytest
import pytest_asyncio

from gateway_slurm.errors import SlurmUnavailable
from gateway_slurm.slurm.model import JobInfo
from gateway_slurm.slurm.watcher import MIN_POLL_INTERVAL, JobWatcher


class FakeSlurm:
    """Answers from a table, or fails; notes the requests and how many were under way at a time."""

    def __init__(self) -> None:
        self.table: dict[str, str] = {}
        self.error: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.asked: list[tuple[float, frozenset[str]]] = []
        self.in_flight = self.most_in_flight = 0

    async def queue_positions(self, partitions: Collection[str]) -> dict[str, int]:
        """No other job waits."""
        return {}

    async def jobs(self, jobids: Collection[str]) -> dict[str, JobInfo]:
        """Answer for the jobs in the table."""
        self.asked.append((asyncio.get_running_loop().time(), frozenset(jobids)))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await self.gate.wait()
            if self.error:
                raise self.error
            return {jobid: JobInfo(jobid=jobid, state=self.table[jobid]) for jobid in jobids if jobid in self.table}
        finally:
            self.in_flight -= 1


async def until(condition: Callable[[], bool], within: float = 10) -> None:
    """Return as soon as the condition holds."""
    deadline = asyncio.get_running_loop().time() + within
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, "it did not come true"
        await asyncio.sleep(0.002)


async def test_the_fake_keeps_the_contract(slurm: FakeSlurm) -> None:
    """The fake answers as the driver does: with known jobs only, and with SlurmUnavailable when it is down."""
    slurm.table = {"1": "RUNNING"}
    assert set(await slurm.jobs(["1", "12"])) == {"1"}
    assert await slurm.jobs(["12"]) == {}
    slurm.error = SlurmUnavailable("down")
    with pytest.raises(SlurmUnavailable):
        await slurm.jobs(["1"])


@pytest.fixture
def slurm() -> FakeSlurm:
    """A Slurm that answers at once."""
    return FakeSlurm()


@pytest_asyncio.fixture
async def watcher(slurm: FakeSlurm) -> AsyncIterator[JobWatcher]:
    """A watcher that is a hundred times as fast as usual."""
    made = JobWatcher(slurm, interval=(0.01, 0.15))
    yield made
    await made.close()


async def test_each_callback_gets_its_job(slurm: FakeSlurm, watcher: JobWatcher) -> None:
    """Each callback gets its own job, and one request is for all jobs."""
    heard: dict[str, list[str]] = {"1": [], "12": []}
    slurm.table = {"1": "PENDING", "12": "RUNNING"}
    for jobid, states in heard.items():
        watcher.watch(jobid, lambda info, states=states: states.append(info.state if info else "gone"))
    await until(lambda: all(len(states) > 1 for states in heard.values()))
    assert set(heard["1"]) == {"PENDING"}
    assert set(heard["12"]) == {"RUNNING"}
    assert {jobids for _, jobids in slurm.asked} == {frozenset({"1", "12"})}


async def test_backs_off(slurm: FakeSlurm, watcher: JobWatcher) -> None:
    """The interval grows up to the longest one, and a new watch resets it."""
    slurm.table = {"1": "PENDING"}
    watcher.watch("1", lambda info: None)
    await until(lambda: len(slurm.asked) >= 9)
    times = [when for when, _ in slurm.asked]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert gaps[5] > 2 * gaps[0]
    assert gaps[7] > 0.12
    watcher.watch("2", lambda info: None)
    since = asyncio.get_running_loop().time()
    await until(lambda: len(slurm.asked) >= 10)
    assert slurm.asked[9][0] - since < 0.1


async def test_one_call_in_flight(slurm: FakeSlurm, watcher: JobWatcher) -> None:
    """While a request is under way there is no second one, even after ``poll_soon``."""
    slurm.gate.clear()
    watcher.watch("1", lambda info: None)
    await until(lambda: slurm.in_flight == 1)
    for number in range(20):
        watcher.watch(str(number), lambda info: None)
        watcher.poll_soon("1")
        await asyncio.sleep(0.005)
    assert len(slurm.asked) == 1
    slurm.gate.set()
    await until(lambda: len(slurm.asked) >= 2)
    assert slurm.most_in_flight == 1
    assert len(slurm.asked[1][1]) == 20


@pytest.mark.parametrize("error", [SlurmUnavailable("down"), RuntimeError("our own fault")])
async def test_failure_declares_nothing(
    slurm: FakeSlurm, watcher: JobWatcher, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """While Slurm does not answer no callback runs, one warning is logged, and polling goes on."""
    caplog.set_level(logging.INFO)
    heard: list[object] = []
    slurm.error = error
    watcher.watch("1", heard.append)
    await until(lambda: len(slurm.asked) >= 4)
    assert heard == []
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    slurm.error, slurm.table = None, {"1": "RUNNING"}
    await until(lambda: bool(heard))
    assert heard[0] is not None


async def test_gone_takes_two_answers(slurm: FakeSlurm, watcher: JobWatcher) -> None:
    """A job is unknown after a healthy controller reported it twice in a row; a failure between does not count."""
    heard: list[object] = []
    watcher.watch("1", lambda info: heard.append((info, len(slurm.asked))))
    await until(lambda: bool(heard))
    assert heard[0] == (None, 2)


async def test_an_answer_forgets_a_miss(slurm: FakeSlurm, watcher: JobWatcher) -> None:
    """A miss, an answer and a miss again are not two in a row."""
    answers = iter([{}, {"1": "RUNNING"}, {}, {"1": "RUNNING"}, {}, {"1": "RUNNING"}])
    heard: list[object] = []

    async def jobs(jobids: Collection[str]) -> dict[str, JobInfo]:
        return {jobid: JobInfo(jobid=jobid, state=state) for jobid, state in next(answers, {"1": "RUNNING"}).items()}

    slurm.jobs = jobs  # type: ignore[method-assign]
    watcher.watch("1", heard.append)
    await until(lambda: len(heard) >= 3)
    assert None not in heard


async def test_nothing_watched_nothing_asked(slurm: FakeSlurm, watcher: JobWatcher) -> None:
    """There is no request before the first watch or after the last unwatch."""
    slurm.table = {"1": "PENDING"}
    watcher.watch("1", lambda info: watcher.unwatch("1"))
    await until(lambda: not watcher._watched)
    asked = len(slurm.asked)
    task = watcher._task
    assert task is not None
    await asyncio.wait_for(asyncio.shield(task), 5)  # the poller itself is gone, so nothing can ask
    assert len(slurm.asked) == asked == 1
    watcher.watch("1", lambda info: None)
    await until(lambda: len(slurm.asked) > asked)


async def test_poll_soon(slurm: FakeSlurm) -> None:
    """``poll_soon`` does not wait for the interval."""
    watcher = JobWatcher(slurm, interval=(1000, 1000))
    heard: list[object] = []
    watcher.watch("1", heard.append)
    slurm.table = {"1": "NODE_FAIL"}
    watcher.poll_soon("1")
    await until(lambda: bool(heard))
    watcher.poll_soon("nobody")
    await watcher.close()


async def test_repeated_poll_soon_is_limited(slurm: FakeSlurm) -> None:
    """The first call polls at once, the following ones together, and no more often than usual."""
    watcher = JobWatcher(slurm, interval=(0.1, 1000))
    slurm.table = {"1": "RUNNING"}
    began = asyncio.get_running_loop().time()
    while len(slurm.asked) < 5:
        watcher.watch("1", lambda info: None)
        watcher.poll_soon("1")
        await asyncio.sleep(0.001)
    times = [when for when, _ in slurm.asked]
    assert times[0] - began < 0.09
    assert min(later - earlier for earlier, later in pairwise(times)) >= 0.1
    await watcher.close()


async def test_poll_soon_after_a_long_interval_polls_at_once(slurm: FakeSlurm) -> None:
    """The shortest interval may be long; the pause between two polls is not."""
    watcher = JobWatcher(slurm, interval=(1000, 1000))
    slurm.table = {"1": "RUNNING"}
    watcher.watch("1", lambda info: None)
    watcher.poll_soon("1")
    await until(lambda: len(slurm.asked) == 1)
    watcher.poll_soon("1")
    await until(lambda: len(slurm.asked) == 2)
    first, second = (when for when, _ in slurm.asked)
    assert second - first >= MIN_POLL_INTERVAL
    await watcher.close()


async def test_no_callback_after_unwatch(slurm: FakeSlurm, watcher: JobWatcher) -> None:
    """An answer that arrives after unwatch does not reach the callback."""
    heard: list[object] = []
    slurm.table = {"1": "RUNNING", "2": "RUNNING"}
    slurm.gate.clear()
    watcher.watch("1", heard.append)
    watched: list[object] = []
    watcher.watch("2", watched.append)
    await until(lambda: slurm.in_flight == 1)
    watcher.unwatch("1")
    slurm.gate.set()
    await until(lambda: bool(watched))
    assert heard == []


async def test_a_failing_callback_does_not_affect_others(slurm: FakeSlurm, watcher: JobWatcher) -> None:
    """The error is logged, and the other callbacks still run."""

    def fail(info: JobInfo | None) -> None:
        raise RuntimeError("a bug")

    heard: list[object] = []
    slurm.table = {"1": "RUNNING", "2": "RUNNING"}
    watcher.watch("1", fail)
    watcher.watch("2", heard.append)
    await until(lambda: len(heard) >= 2)


async def test_close(slurm: FakeSlurm) -> None:
    """Closing ends a request that is under way, is idempotent, and forbids new watches."""
    watcher = JobWatcher(slurm, interval=(0.01, 0.01))
    slurm.gate.clear()
    watcher.watch("1", lambda info: None)
    await until(lambda: slurm.in_flight == 1)
    await watcher.close()
    await watcher.close()
    assert slurm.in_flight == 0
    with pytest.raises(RuntimeError):
        watcher.watch("2", lambda info: None)
