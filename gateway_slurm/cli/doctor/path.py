"""The walk of ``jupyter slurm doctor``: its options, and what it prints."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import math
import signal
import sys
import time
import uuid
from collections.abc import Callable
from typing import Any, Final

from jupyter_client.manager import AsyncKernelManager

from gateway_slurm._util import printable
from gateway_slurm.access import SlurmUsers
from gateway_slurm.allocations.launcher import Launcher
from gateway_slurm.allocations.model import Allocation
from gateway_slurm.cli.common import discard_output
from gateway_slurm.cli.doctor.spec import OPTIONS, Asked, OneSpec
from gateway_slurm.cli.doctor.steps import STEPS, Outcome, change_for, step_of
from gateway_slurm.config import config_files
from gateway_slurm.errors import AllocationError, CryptoMissing, GatewaySlurmError, KernelStartError, NotProven
from gateway_slurm.request import FIELDS
from gateway_slurm.service import SlurmService
from gateway_slurm.slurm.driver import SlurmDriver
from gateway_slurm.slurm.formats import Meaning

LOOK_EVERY: Final = 0.02  # seconds; memory only
ANSWER_SECONDS: Final = 60.0
# slurm.conf's KillWait is 30 s by default, and its epilog takes a while.
GONE_SECONDS: Final = 60.0
ORPHAN_SECONDS: Final = 60.0
"""After which the walk's job ends if this process dies."""


class Walk:
    """One walk; ``tell`` hears of each step as it is done, ``note`` of what goes on meanwhile."""

    def __init__(
        self,
        asked: Asked,
        *,
        tell: Callable[[Outcome], None],
        note: Callable[[str], None],
        log: logging.Logger,
    ) -> None:
        self.outcomes: list[Outcome] = []
        self._asked, self._tell, self._note, self.log = asked, tell, note, log
        self._began = time.monotonic()
        self._service: SlurmService | None = None
        self._specs: OneSpec
        self._driver: SlurmDriver | None = None
        self._allocation: Allocation | None = None
        self._noted = ""

    @property
    def failed(self) -> bool:
        """Whether a step has failed."""
        return not all(each.ok for each in self.outcomes)

    @property
    def slurm_answers(self) -> bool:
        """Whether it came so far."""
        return "slurm" in {each.step for each in self.outcomes if each.ok}

    async def run(self) -> None:
        """Walk; a step that fails, or a cancellation, ends it. Nothing is left of it then."""
        try:
            await self._walk()
        except GatewaySlurmError as error:
            self._fail(error)
        except asyncio.CancelledError:
            self._done(self._under_way, "interrupted", ok=False)
        ending = asyncio.ensure_future(self._end())
        while not ending.done():
            try:
                await asyncio.shield(ending)
            except asyncio.CancelledError:
                self._note("the job is being ended; that takes a moment")
        ending.result()

    async def _walk(self) -> None:
        service = self._service = self._read_settings()
        users = SlurmUsers(service, service.access)
        self._done("login", await service.run(service.access.connect()))
        self._driver = users.driver_of(self._asked.user)
        about = await service.run(self._driver.about())
        self._specs.complete(about)
        self._done("slurm", f"version {about.version or 'unknown'}; partitions {', '.join(map(str, about.partitions))}")
        self._done("server", await self._open(service))
        await self._kernel()

    # -- telling ----------------------------------------------------------------------------------

    @property
    def _under_way(self) -> str:
        told = {each.step for each in self.outcomes}
        return next(step for step in STEPS if step not in told)

    def _done(self, step: str, said: str, *, ok: bool = True, change: str = "") -> None:
        if any(each.step == step for each in self.outcomes):
            return
        now = time.monotonic()
        outcome = Outcome(step, ok, said, now - self._began, change)
        self._began = now
        self.outcomes.append(outcome)
        self._tell(outcome)

    def _fail(self, error: GatewaySlurmError) -> None:
        step = step_of(error, self._under_way)
        # What a launcher that complains, or is not let in, has gone through already.
        if list(STEPS).index(step) > list(STEPS).index("run") and self._allocation is not None:
            self._look_at_job(self._allocation, runs=True)
        if isinstance(error, (CryptoMissing, NotProven)):
            self._done("dial", "it came")
        if isinstance(error, NotProven):
            self._done("python", "it has pycryptodome")
        self._done(
            step, str(error).replace("SlurmService.queue_timeout", "--wait"), ok=False, change=change_for(step, error)
        )

    # -- steps --------------------------------------------------------------------------------------

    def _read_settings(self) -> SlurmService:
        service = SlurmService.instance(self.log)
        self._service = service
        service.recovers = False  # the findings tell of it
        service.deployment, service.orphan_jobs = "", "leave"
        service.queue_timeout, service.idle_timeout = self._asked.wait, 0.0
        service.orphan_timeout = min(service.orphan_timeout or ORPHAN_SECONDS, ORPHAN_SECONDS)
        self._specs = OneSpec(self._asked, service.launcher_python)
        files = ", ".join(map(str, config_files())) or "no jupyter_slurm_config.py: defaults"
        config = self._specs.fields
        fields = ", ".join(f"{name} {value}" for name, value in config.items() if name not in ("kernel_argv",))
        self._done("settings", f"{files}; cluster {service.cluster}; {self._specs.shown} with {fields}")
        return service

    @staticmethod
    async def _open(service: SlurmService) -> str:
        await service.run(service.open())
        await service.run(service.access.wait_ready())
        addresses = service.access.endpoints(service.endpoints)
        return f"{service.registry.store.shown}; launchers are to dial {', '.join(addresses)}"

    async def _kernel(self) -> None:
        kernel_id = str(uuid.uuid4())
        manager = AsyncKernelManager(
            kernel_name=self._specs.name, kernel_spec_manager=self._specs, parent=None, log=self.log
        )
        start = asyncio.ensure_future(manager.start_kernel(kernel_id=kernel_id, slurm_owner=self._asked.user))
        try:
            while not start.done():
                await asyncio.wait([start], timeout=LOOK_EVERY)
                self._look(kernel_id)
            start.result()
            self._done("kernel", self._how(manager))
            self._done("execute", await self._answer(manager))
        finally:
            if not start.done():
                start.cancel()
                await asyncio.wait([start], timeout=GONE_SECONDS)
                self._look(kernel_id)
            if manager.has_kernel:
                await asyncio.shield(manager.shutdown_kernel(now=self.failed))

    def _look(self, kernel_id: str) -> None:
        """Tell what is new of the start."""
        assert self._service is not None
        allocations = self._service.owners.of(self._asked.user)
        found = next((each for each in allocations.listed() if kernel_id in each.kernel_ids), self._allocation)
        if found is None:
            return
        self._allocation = found
        self._done("submit", f"job {found.jobid}, partition {found.request.partition}")
        self._look_at_job(found, runs=found.runs)
        launcher = next((each for each in list(found.launchers.values()) if each.was_up), None)
        if launcher is not None:
            self._look_at_launcher(launcher)

    def _look_at_job(self, allocation: Allocation, *, runs: bool) -> None:
        info = allocation.info
        if runs:
            self._done("run", f"on {', '.join(allocation.nodes) or 'a node'}")
        elif info is not None:
            place = f", place {allocation.queue_place} in the queue" if allocation.queue_place else ""
            line = f"job {info.jobid} is {info.state} ({info.reason or 'no reason given'}){place}"
            if line != self._noted:
                self._noted = line
                self._note(line)

    def _look_at_launcher(self, launcher: Launcher) -> None:
        in_vain = "".join(f"\nnot at {address}: {why}" for address, why in launcher.in_vain)
        self._done("dial", f"from {launcher.node} to {launcher.reached}{in_vain}")
        self._done("python", launcher.python)
        self._done("crypto", "X25519 and AES-256-GCM (HPKE), both sides proven by the launch token")

    @staticmethod
    def _how(manager: AsyncKernelManager) -> str:
        process = manager.provisioner._held.process  # type: ignore[union-attr]
        ways = {"direct": f"direct at {process.ip}, CurveZMQ", "ipc": "through the tunnel, Unix sockets on the node"}
        why = process.launched.why
        way = ways.get(process.mode, "through the tunnel, loopback TCP on the node")
        return f"process {process.pid}; {way}{f': {why}' if why else ''}"

    async def _answer(self, manager: AsyncKernelManager) -> str:
        """What it says to 1+1. Raises KernelStartError when it ends, says nothing, or is a Python that cannot do it."""
        assert self._service is not None
        process = manager.provisioner._held.process  # type: ignore[union-attr]
        answer = asyncio.ensure_future(_ask(manager))
        dead = asyncio.ensure_future(self._service.run(process.wait()))
        try:
            await asyncio.wait({answer, dead}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                tail = f"; its output ends:\n{process.output_tail}" if process.output_tail else ""
                raise KernelStartError(f"the kernel ended while it was asked: {process.reason}{tail}")
            content, text = answer.result()
        except (RuntimeError, TimeoutError) as error:
            raise KernelStartError(f"the kernel did not answer: {error or 'timeout'}") from error
        finally:
            for task in (answer, dead):
                task.cancel()
            await asyncio.wait({answer, dead})
        if content["status"] == "ok":
            return text or "ok"
        said = f"{content.get('ename')}: {content.get('evalue')}"
        # To other languages it need not mean anything.
        if self._specs.language == "python":
            raise KernelStartError(f"the kernel answered with an error: {said}")
        return f"{self._specs.language} says {said}"

    # -- the end --------------------------------------------------------------------------------------

    async def _end(self) -> None:
        service = self._service
        if service is None:
            return
        try:
            if self._allocation is not None and self._driver is not None:
                await self._see_it_gone(service, self._driver, self._allocation.jobid)
            elif not self.failed or service.is_open:
                self._done("end", "no job was made")
        except GatewaySlurmError as error:
            self._done("end", str(error), ok=False, change=change_for("end", AllocationError("")))
        finally:
            if not service.is_open:
                await service.run(service.access.close())
            await asyncio.to_thread(service.close)

    async def _see_it_gone(self, service: SlurmService, driver: SlurmDriver, jobid: str) -> None:
        deadline = time.monotonic() + GONE_SECONDS
        while True:
            info = (await service.run(driver.jobs([jobid]))).get(jobid)
            if info is None or info.meaning is Meaning.OVER:
                break
            if time.monotonic() > deadline:
                raise AllocationError(f"job {jobid} is still there after {GONE_SECONDS:g} s: {info.state}", jobid=jobid)
            await asyncio.sleep(0.2)
        self._done("end", f"job {jobid} is over" + (f" ({info.state})" if info is not None else ""))


async def _ask(manager: AsyncKernelManager) -> tuple[dict[str, Any], str]:
    """The reply to 1+1, and what was printed."""
    client = manager.client()
    client.start_channels()
    said: list[str] = []

    def hear(message: dict[str, Any]) -> None:
        content = message["content"]
        said.append(str(content.get("data", {}).get("text/plain") or content.get("text") or ""))

    try:
        await client.wait_for_ready(timeout=ANSWER_SECONDS)
        reply = await client.execute_interactive(
            "1+1", allow_stdin=False, timeout=ANSWER_SECONDS, output_hook=hear, store_history=False
        )
    finally:
        client.stop_channels()
    return reply["content"], "".join(said).strip()


# -- The walk of ``jupyter slurm doctor``: its options, and what it prints. --


WALK_FAILED = 3


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that say what is asked for."""
    group = parser.add_argument_group(
        "the walk", "A job is submitted and a kernel started in it, as the user's are; both are ended again."
    )
    group.add_argument("--walk", action=argparse.BooleanOptionalAction, default=True, help="walk (the default)")
    group.add_argument("--only-walk", action="store_true", help="walk, and look for nothing that is left")
    group.add_argument(
        "--kernelspec",
        default="",
        metavar="NAME",
        help="take everything from this kernelspec, or from a path of its directory; without it and without "
        "--project the first one with slurm-provisioner is taken",
    )
    helps = {each.name: each.help for each in FIELDS}
    for name in OPTIONS:
        group.add_argument(f"--{name.replace('_', '-')}", dest=f"field_{name}", metavar="VALUE", help=helps[name])
    group.add_argument("--user", default="", help="whose kernel it is to be, where run_as is user (default: yours)")
    group.add_argument(
        "--wait",
        type=_seconds,
        default=Asked.wait,
        metavar="SECONDS",
        help=f"how long the job may wait in the queue before it is cancelled (default: {Asked.wait:g})",
    )
    group.add_argument("--verbose", action="store_true", help="show the log, too")


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (seconds := float(text)) < math.inf:
            return seconds
    raise argparse.ArgumentTypeError("seconds are a number above 0")


def walk(arguments: argparse.Namespace) -> Walk:
    """Walk as the options say; what is done is printed as it goes, unless it is for programs."""
    fields = {name: value for name in OPTIONS if (value := getattr(arguments, f"field_{name}")) is not None}
    asked = Asked(arguments.kernelspec, fields, arguments.user, arguments.wait)
    show: Callable[[str], None] = (lambda _line: None) if arguments.json else _show

    def tell(outcome: Outcome) -> None:
        for line in outcome.lines():
            show(line)

    walking = Walk(asked, tell=tell, note=lambda line: show(f"{'':<17}{line}"), log=_log(verbose=arguments.verbose))
    asyncio.run(_run(walking))
    return walking


def _show(line: str) -> None:
    try:
        print(printable(line), flush=True)
    except BrokenPipeError:
        # As Ctrl-C, so that the job goes with the walk.
        discard_output()
        signal.raise_signal(signal.SIGINT)


async def _run(walking: Walk) -> None:
    """Walk; a signal that ends programs ends it in good order."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, task.cancel)
    await walking.run()


def _log(*, verbose: bool) -> logging.Logger:
    """What goes wrong is told by the steps; the log is for who wants to see more."""
    log = logging.getLogger("gateway_slurm.walk")
    log.propagate = False
    handler: logging.Handler = logging.StreamHandler(sys.stderr) if verbose else logging.NullHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    return log
