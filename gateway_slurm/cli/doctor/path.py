"""The path check of ``jupyter slurm doctor``: one kernel is started as users' kernels are, and each step is reported.

The check submits a job, starts a kernel in it, and ends both.
"""

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
from gateway_slurm.addresses import failed_dial
from gateway_slurm.allocations.model import Allocation
from gateway_slurm.cli.common import discard_output
from gateway_slurm.cli.doctor.spec import OPTIONS, CheckedKernelSpecs, CheckOptions
from gateway_slurm.cli.doctor.steps import INDENT, STEPS, StepResult, change_for, step_of
from gateway_slurm.config import config_files
from gateway_slurm.errors import AllocationError, CryptoMissing, GatewaySlurmError, KernelStartError, NotProven
from gateway_slurm.request import FIELDS
from gateway_slurm.service import SlurmService
from gateway_slurm.slurm.driver import SlurmDriver
from gateway_slurm.slurm.formats import Meaning

PATH_CHECK_FAILED: Final = 3
"""The exit status."""
PROGRESS_INTERVAL: Final = 0.02
"""Seconds between two looks at the start's progress, which is in this process's memory."""
ANSWER_TIMEOUT: Final = 60.0
"""Seconds that the kernel may take to answer 1+1."""
END_TIMEOUT: Final = 60.0
"""Seconds that the job may take to end: KillWait in slurm.conf is 30 s by default, and an epilog follows."""
ORPHAN_TIMEOUT: Final = 60.0
"""Seconds after which the job ends if this process dies."""


class PathCheck:
    """One check. ``show`` prints a line: the result of a step, or what the job waits for."""

    def __init__(self, options: CheckOptions, *, show: Callable[[str], None], log: logging.Logger) -> None:
        self.results: list[StepResult] = []
        self._options, self._show, self.log = options, show, log
        self._step_began = time.monotonic()
        self._service: SlurmService | None = None
        self._specs: CheckedKernelSpecs
        self._driver: SlurmDriver | None = None
        self._allocation: Allocation | None = None
        self._last_progress = ""

    @property
    def failed(self) -> bool:
        """Whether a step has failed."""
        return not all(result.ok for result in self.results)

    @property
    def slurm_answers(self) -> bool:
        """Whether the check got an answer from Slurm."""
        return any(result.step == "slurm" and result.ok for result in self.results)

    async def run(self) -> None:
        """Check every step. A failed step or a cancellation ends the check; its job is ended in any case."""
        try:
            await self._check()
        except GatewaySlurmError as error:
            self._fail(error)
        except asyncio.CancelledError:
            self._done(self._current_step, "interrupted", ok=False)
        ending = asyncio.ensure_future(self._end())
        while not ending.done():
            try:
                await asyncio.shield(ending)
            except asyncio.CancelledError:
                self._show(f"{INDENT}the job is being ended; please wait")
        ending.result()

    async def _check(self) -> None:
        service = self._read_settings()
        users = SlurmUsers(service, service.access)
        self._done("login", await service.run(service.access.connect()))
        self._driver = users.driver_of(self._options.user)
        about = await service.run(self._driver.cluster_info())
        self._specs.complete(about)
        self._done("slurm", f"version {about.version or 'unknown'}; partitions {', '.join(map(str, about.partitions))}")
        self._done("server", await self._open(service))
        await self._kernel()

    # -- results ----------------------------------------------------------------------------------

    @property
    def _current_step(self) -> str:
        done = {result.step for result in self.results}
        return next(step for step in STEPS if step not in done)

    def _done(self, step: str, message: str, *, ok: bool = True, change: str = "") -> None:
        """Report the step's result, unless it was reported already."""
        if any(result.step == step for result in self.results):
            return
        now = time.monotonic()
        result = StepResult(step, ok, message, now - self._step_began, change)
        self._step_began = now
        self.results.append(result)
        for line in result.lines():
            self._show(line)

    def _fail(self, error: GatewaySlurmError) -> None:
        step = step_of(error, self._current_step)
        # A launcher that reports an error, or that the server rejects, has passed the steps before.
        if list(STEPS).index(step) > list(STEPS).index("run") and self._allocation is not None:
            self._report_job(self._allocation, runs=True)
        if isinstance(error, (CryptoMissing, NotProven)):
            self._done("dial", "the launcher reached the server")
        if isinstance(error, NotProven):
            self._done("python", "pycryptodome is installed")
        self._done(
            step, str(error).replace("SlurmService.queue_timeout", "--wait"), ok=False, change=change_for(step, error)
        )

    # -- steps --------------------------------------------------------------------------------------

    def _read_settings(self) -> SlurmService:
        service = SlurmService.instance(self.log)
        self._service = service
        service.recovers = False  # the doctor's findings report what dead servers have left
        service.deployment, service.orphan_jobs = "", "leave"
        service.queue_timeout, service.idle_timeout = self._options.wait, 0.0
        service.orphan_timeout = min(service.orphan_timeout or ORPHAN_TIMEOUT, ORPHAN_TIMEOUT)
        self._specs = CheckedKernelSpecs(self._options, service.launcher_python)
        files = ", ".join(map(str, config_files())) or "no jupyter_slurm_config.py, so the defaults"
        config = self._specs.fields
        fields = ", ".join(f"{name} {value}" for name, value in config.items() if name != "kernel_argv")
        self._done("settings", f"{files}; cluster {service.cluster}; {self._specs.description} with {fields}")
        return service

    @staticmethod
    async def _open(service: SlurmService) -> str:
        await service.run(service.open())
        await service.run(service.access.wait_ready())
        addresses = service.addresses.of_this_server()
        return f"{service.registry.store.name}; launchers will dial {', '.join(addresses)}"

    async def _kernel(self) -> None:
        kernel_id = str(uuid.uuid4())
        manager = AsyncKernelManager(
            kernel_name=self._specs.name, kernel_spec_manager=self._specs, parent=None, log=self.log
        )
        start = asyncio.ensure_future(manager.start_kernel(kernel_id=kernel_id, slurm_owner=self._options.user))
        try:
            while not start.done():
                await asyncio.wait([start], timeout=PROGRESS_INTERVAL)
                self._report_progress(kernel_id)
            start.result()
            self._done("kernel", self._transport_of(manager))
            self._done("execute", await self._execute(manager))
        finally:
            if not start.done():
                start.cancel()
                await asyncio.wait([start], timeout=END_TIMEOUT)
                self._report_progress(kernel_id)
            if manager.has_kernel:
                await asyncio.shield(manager.shutdown_kernel(now=self.failed))

    def _report_progress(self, kernel_id: str) -> None:
        """Report the steps that the start has passed since the last call."""
        assert self._service is not None
        allocations = self._service.owners.of(self._options.user)
        allocation = next(
            (item for item in allocations.table.listed() if kernel_id in item.kernel_ids), self._allocation
        )
        if allocation is None:
            return
        self._allocation = allocation
        self._done("submit", f"job {allocation.jobid}, partition {allocation.request.partition}")
        self._report_job(allocation, runs=allocation.is_running)
        launcher = next((item for item in list(allocation.launchers.values()) if item.was_up), None)
        if launcher is not None:
            in_vain = "".join(
                f"\nno connection to {address}: {failed_dial(address, why)}" for address, why in launcher.failed_dials
            )
            self._done("dial", f"from {launcher.node} to {launcher.reached}{in_vain}")
            self._done("python", launcher.python)
            self._done("crypto", "X25519 and AES-256-GCM (HPKE), both sides are authenticated by the launch token")

    def _report_job(self, allocation: Allocation, *, runs: bool) -> None:
        info = allocation.info
        if runs:
            self._done("run", f"on {', '.join(allocation.nodes) or 'a node'}")
        elif info is not None:
            place = f", place {allocation.queue_place} in the queue" if allocation.queue_place else ""
            advice = f"; {info.pending.advice}" if info.pending.advice else ""
            line = f"job {info.jobid} is {info.state} ({info.reason or 'no reason given'}){place}{advice}"
            if line != self._last_progress:
                self._last_progress = line
                self._show(INDENT + line)

    @staticmethod
    def _transport_of(manager: AsyncKernelManager) -> str:
        process = manager.provisioner._handle.process  # type: ignore[union-attr]
        transports = {
            "direct": f"direct at {process.ip}, CurveZMQ",
            "ipc": "through the tunnel, Unix sockets on the node",
        }
        why = process.launched.why
        transport = transports.get(process.mode, "through the tunnel, loopback TCP on the node")
        return f"process {process.pid}; {transport}{f': {why}' if why else ''}"

    async def _execute(self, manager: AsyncKernelManager) -> str:
        """The kernel's answer to 1+1.

        Raises KernelStartError if the kernel ends or does not answer, or if a Python kernel answers with an error.
        """
        assert self._service is not None
        process = manager.provisioner._handle.process  # type: ignore[union-attr]
        answer = asyncio.ensure_future(_evaluate(manager))
        dead = asyncio.ensure_future(self._service.run(process.wait()))
        try:
            await asyncio.wait({answer, dead}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                tail = f"; its output ends:\n{process.output_tail}" if process.output_tail else ""
                raise KernelStartError(f"the kernel ended before it answered: {process.reason}{tail}")
            content, text = answer.result()
        except (RuntimeError, TimeoutError) as error:
            raise KernelStartError(f"the kernel did not answer: {error or 'timeout'}") from error
        finally:
            for task in (answer, dead):
                task.cancel()
            await asyncio.wait({answer, dead})
        if content["status"] == "ok":
            return text or "ok"
        complaint = f"{content.get('ename')}: {content.get('evalue')}"
        # 1+1 is not an expression in every language, so an error is an answer, too.
        if self._specs.language == "python":
            raise KernelStartError(f"the kernel answered with an error: {complaint}")
        return f"the kernel, of language {self._specs.language}, answered with {complaint}"

    # -- the end --------------------------------------------------------------------------------------

    async def _end(self) -> None:
        service = self._service
        if service is None:
            return
        try:
            if self._allocation is not None and self._driver is not None:
                await self._until_over(service, self._driver, self._allocation.jobid)
            elif not self.failed or service.is_open:
                self._done("end", "no job was submitted")
        except GatewaySlurmError as error:
            self._done("end", str(error), ok=False, change=change_for("end", AllocationError("")))
        finally:
            if not service.is_open:
                await service.run(service.access.close())
            await asyncio.to_thread(service.close)

    async def _until_over(self, service: SlurmService, driver: SlurmDriver, jobid: str) -> None:
        deadline = time.monotonic() + END_TIMEOUT
        while True:
            info = (await service.run(driver.jobs([jobid]))).get(jobid)
            if info is None or info.meaning is Meaning.OVER:
                break
            if time.monotonic() > deadline:
                raise AllocationError(f"job {jobid} has not ended after {END_TIMEOUT:g} s: {info.state}", jobid=jobid)
            await asyncio.sleep(0.2)
        self._done("end", f"job {jobid} is over" + (f" ({info.state})" if info is not None else ""))


async def _evaluate(manager: AsyncKernelManager) -> tuple[dict[str, Any], str]:
    """The content of the reply to 1+1, and the text of its output."""
    client = manager.client()
    client.start_channels()
    texts: list[str] = []

    def collect(message: dict[str, Any]) -> None:
        content = message["content"]
        texts.append(str(content.get("data", {}).get("text/plain") or content.get("text") or ""))

    try:
        await client.wait_for_ready(timeout=ANSWER_TIMEOUT)
        reply = await client.execute_interactive(
            "1+1", allow_stdin=False, timeout=ANSWER_TIMEOUT, output_hook=collect, store_history=False
        )
    finally:
        client.stop_channels()
    return reply["content"], "".join(texts).strip()


# -- command line --------------------------------------------------------------------------------


def add_path_check_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the path check."""
    group = parser.add_argument_group(
        "path check", "A job is submitted and a kernel is started in it, as for the user's notebooks; both are ended."
    )
    group.add_argument(
        "--walk", action=argparse.BooleanOptionalAction, default=True, help="check the path (the default)"
    )
    group.add_argument("--only-walk", action="store_true", help="check the path, and do not look for leftovers")
    group.add_argument(
        "--kernelspec",
        default="",
        metavar="NAME",
        help="the kernelspec to start, by name or by the path of its directory (default: the first one with "
        "slurm-provisioner, unless --project is given)",
    )
    helps = {field.name: field.help for field in FIELDS}
    for name in OPTIONS:
        group.add_argument(f"--{name.replace('_', '-')}", dest=f"field_{name}", metavar="VALUE", help=helps[name])
    group.add_argument(
        "--user", default="", help="the Unix user who owns the kernel, where run_as is user (default: you)"
    )
    group.add_argument(
        "--wait",
        type=_seconds,
        default=CheckOptions.wait,
        metavar="SECONDS",
        help=f"seconds that the job may wait in the queue; then it is cancelled (default: {CheckOptions.wait:g})",
    )
    group.add_argument("--verbose", action="store_true", help="show the log as well")


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (seconds := float(text)) < math.inf:
            return seconds
    raise argparse.ArgumentTypeError("must be a number of seconds above 0")


def check_path(arguments: argparse.Namespace) -> PathCheck:
    """Run the path check that the options ask for; print each step when it is done, unless ``--json`` is given."""
    fields = {name: value for name in OPTIONS if (value := getattr(arguments, f"field_{name}")) is not None}
    options = CheckOptions(arguments.kernelspec, fields, arguments.user, arguments.wait)
    show: Callable[[str], None] = (lambda _line: None) if arguments.json else print_line
    check = PathCheck(options, show=show, log=_make_log(verbose=arguments.verbose))
    asyncio.run(_run(check))
    return check


def print_line(line: str) -> None:
    """Print a line of untrusted text."""
    try:
        print(printable(line), flush=True)
    except BrokenPipeError:
        # No more output is wanted, as by ``| head``: end as after Ctrl-C, so that the job is ended as well.
        discard_output()
        signal.raise_signal(signal.SIGINT)


async def _run(check: PathCheck) -> None:
    """Run the check; SIGINT and SIGTERM cancel it, and its job is ended."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, task.cancel)
    await check.run()


def _make_log(*, verbose: bool) -> logging.Logger:
    """The log of the check, which is shown on ``--verbose`` only: the steps' results report what fails."""
    log = logging.getLogger("gateway_slurm.path_check")
    log.propagate = False
    handler: logging.Handler = logging.StreamHandler(sys.stderr) if verbose else logging.NullHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    return log
