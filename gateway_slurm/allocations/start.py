"""Getting a launcher into an allocation: as the job's own script, or as a job step; and waiting for it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from gateway_slurm.addresses import dialled_in_vain
from gateway_slurm.allocations.identity import JOB_NAME, STEP_NAME, TOKEN_VARIABLE, new_launcher_id
from gateway_slurm.allocations.launcher import UNKNOWN_NODE, Launcher, moment
from gateway_slurm.allocations.model import Allocation
from gateway_slurm.allocations.walltime import signal_seconds
from gateway_slurm.errors import AllocationError, GatewaySlurmError, LauncherFailed, NotProven, OutOfReach, QueueTimeout
from gateway_slurm.link.program import launcher_program
from gateway_slurm.link.server import ResponseSocket
from gateway_slurm.request import KernelRequest
from gateway_slurm.slurm.account import Account
from gateway_slurm.slurm.driver import SlurmDriver, StepProcess
from gateway_slurm.slurm.formats import remedy
from gateway_slurm.slurm.model import JobSpec, StepSpec
from gateway_slurm.slurm.script import job_script
from gateway_slurm.store import Registry
from gateway_slurm.store.records import LauncherRecord

# How long after its link's end Slurm is first asked whether a restored launcher's step is over, and later.
STEP_AGAIN_FIRST, STEP_AGAIN_LONGEST = 0.5, 30.0
# What the job script's exit codes mean (launchers/, slurm/script.py), beside the launcher's own words.
EXIT_MEANINGS = {
    127: "no Python was found on the node: name one that is there in SlurmService.launcher_python",
}


@dataclass(frozen=True)
class LauncherSettings:
    """The admin's settings that every launcher is made with (seconds, unless the name says else)."""

    pythons: tuple[str, ...]
    log_dir: str
    heartbeat: float
    orphan_timeout: float
    link_timeout: float
    queue_timeout: float
    walltime_warnings: tuple[float, ...]  # minutes before the end
    kept_output: int  # bytes a kernel


class Launching:
    """Makes launchers and waits for them; ``on_up`` and ``on_lost`` hear of their links.

    ``log_end`` reads the end of a launcher's log, where it can be read. ``endpoints`` are this server's own, for a
    launcher's first dial; ``addresses`` those of all servers that may take its kernels over, for all later ones.
    """

    def __init__(
        self,
        driver: SlurmDriver,
        socket: ResponseSocket,
        settings: LauncherSettings,
        *,
        registry: Registry,
        endpoints: Callable[[], list[str]],
        addresses: Callable[[], list[str]],
        log_end: Callable[[str], Awaitable[str]],
        new_token: Callable[[], bytes],
        log: logging.Logger,
        on_up: Callable[[Allocation], None],
        on_lost: Callable[[Allocation], None],
        on_walltime: Callable[[Allocation, Launcher, float | None, bool], None],
    ) -> None:
        self._driver, self._socket, self.settings = driver, socket, settings
        self._registry, self._endpoints, self._addresses = registry, endpoints, addresses
        self._log_end, self._new_token, self.log = log_end, new_token, log
        self._on_up, self._on_lost, self._on_walltime = on_up, on_lost, on_walltime

    def expect(self, allocation: Allocation, *, isolated: bool = False) -> tuple[Launcher, bytes]:
        """A new launcher of ``allocation``, which may dial in from now on, and its launch token.

        ``launcher.tokens`` has the successor, too, by which a later server can let it in.
        """
        launcher = self._new(allocation, new_launcher_id(self._registry.store_id))
        launcher.isolated, launcher.holds_job = isolated, allocation.ours and not allocation.jobid
        launcher.tokens, launcher.epoch = (self._new_token(), self._new_token()), self._registry.epoch
        launcher.expected = self._socket.expect(launcher.launcher_id, launcher.tokens, launcher)
        allocation.launchers[launcher.launcher_id] = launcher
        return launcher, launcher.tokens[0]

    def _new(self, allocation: Allocation, launcher_id: str) -> Launcher:
        settings = self.settings
        return Launcher(
            launcher_id,
            welcome=lambda: {
                "heartbeat": settings.heartbeat,
                "orphan_timeout": settings.orphan_timeout,
                "minutes": allocation.minutes,
                "end_time": allocation.end_time,
                "warn_minutes": settings.walltime_warnings,
                "kept_output": settings.kept_output,
            },
            keep=lambda: allocation.keep,
            heartbeat=settings.heartbeat,
            addresses=self._addresses,
            log=self.log,
            on_up=lambda: self._on_up(allocation),
            on_lost=lambda _launcher, _reason: self._on_lost(allocation),
            on_walltime=lambda launcher, end_time, due: self._on_walltime(allocation, launcher, end_time, due),
        )

    def record(self, allocation: Allocation, launcher: Launcher) -> None:
        """Put on record what the next server process needs to let the launcher in, and to find its kernels."""
        self._registry.put_launcher(
            LauncherRecord(
                launcher_id=launcher.launcher_id,
                record_key=allocation.record_key,
                jobid=launcher.jobid,
                tokens=launcher.tokens,
                node=launcher.node if launcher.was_up else "",
                holds_job=launcher.holds_job,
                isolated=launcher.isolated,
                stepid=launcher.stepid,
                nodelist=launcher.nodelist,
                end_time=launcher.end_time,
                slots=dict(launcher.slots),
                epoch=launcher.epoch,
            )
        )

    def restore(self, allocation: Allocation, record: LauncherRecord) -> Launcher:
        """The launcher that an earlier server process had; it is let in once ``let_in`` is called."""
        launcher = self._new(allocation, record.launcher_id)
        launcher.tokens, launcher.epoch, launcher.slots = record.tokens, record.epoch, dict(record.slots)
        launcher.isolated, launcher.holds_job, launcher.stepid = record.isolated, record.holds_job, record.stepid
        launcher.nodelist, launcher.end_time = record.nodelist, moment(record.end_time)
        launcher.jobid, launcher.restored = allocation.jobid, bool(record.node)
        launcher.node = record.node or UNKNOWN_NODE
        allocation.launchers[launcher.launcher_id] = launcher
        if record.stepid:
            allocation.own_steps.add(record.stepid)
        return launcher

    def let_in(self, launcher: Launcher) -> None:
        """A restored one may dial in from now on: its kernels are known, so that none is stopped as a stranger."""
        launcher.expected = self._socket.expect(launcher.launcher_id, launcher.tokens, launcher)
        launcher.expected.jobid.set_result(launcher.jobid)

    def job(self, launcher: Launcher, token: bytes, request: KernelRequest, account: Account) -> JobSpec:
        """The job whose script is ``launcher``."""
        return JobSpec(
            name=JOB_NAME,
            comment=f"{JOB_NAME}:{launcher.launcher_id}",
            partition=request.partition,
            account=account.account,
            nodes=request.nodes,
            nodelist=request.node,
            time=request.time_limit,
            gres=request.gres_list,
            reservation=request.reservation,
            qos=request.qos,
            cpus=request.cpus,
            memory=request.memory,
            constraint=request.constraint,
            signal_seconds=signal_seconds(self.settings.walltime_warnings, request.minutes),
            script=self._script(launcher, keep=request.keep_allocation),
            env={**account.environment, TOKEN_VARIABLE: token.hex()},
        )

    def _script(self, launcher: Launcher, *, keep: bool = False) -> str:
        timeout = f"{self.settings.orphan_timeout:g}"
        role = "step" if not launcher.holds_job else "keep" if keep else "job"
        return job_script(
            launcher_program(),
            pythons=self.settings.pythons,
            log_dir=self.settings.log_dir,
            arguments=[launcher.launcher_id, ",".join(self._endpoints()), timeout, role],
        )

    async def start_step(
        self, allocation: Allocation, node: str | None, request: KernelRequest | None
    ) -> tuple[Launcher, StepProcess]:
        """A launcher as a job step; for an isolated kernel's ``request`` a step with an exact share."""
        launcher, token = self.expect(allocation, isolated=request is not None)
        assert launcher.expected is not None
        launcher.jobid = allocation.jobid
        launcher.expected.jobid.set_result(allocation.jobid)
        spec = StepSpec(
            jobid=allocation.jobid,
            node=node,
            name=STEP_NAME,
            script=self._script(launcher),
            exact=request is not None,
            cpus=(request.cpus or 1) if request else None,
            memory=request.memory if request else None,
            gres=request.gres_list if request else (),
            env={TOKEN_VARIABLE: token.hex()},
        )
        try:
            await self.wait_until_running(allocation)
            self.record(allocation, launcher)
            await self._registry.flushed()
            step = await self._driver.start_step(spec)
        except BaseException:
            # Others may be waiting for this launcher already.
            self.drop(allocation, launcher, f"no launcher could be started in job {allocation.jobid}")
            raise
        return launcher, step

    async def wait_until_running(self, allocation: Allocation) -> None:
        """Raises AllocationEnded when the job ends instead."""
        while not allocation.runs:
            if allocation.ended.done():
                raise allocation.ended.result()
            await asyncio.sleep(0.2)  # memory only: the watcher asks Slurm, for all jobs at once

    async def follow_step(self, allocation: Allocation, launcher: Launcher, step: StepProcess) -> None:
        """A launcher that is a step of its own ends with its srun, as a rule.

        An srun that is killed leaves its step running: what was up is over when Slurm says so.
        """
        reason = f"its launcher's job step in job {allocation.jobid} ended"
        try:
            await step.wait()
        except GatewaySlurmError as error:
            reason = f"its launcher's job step in job {allocation.jobid} failed: {error}"
            launcher.fail(self._step_error(launcher, allocation, error))
            if launcher.was_up:
                await self.follow_restored_step(allocation, launcher, reason)
                return
            await launcher.gone.wait()
        self.drop(allocation, launcher, reason)

    async def follow_restored_step(self, allocation: Allocation, launcher: Launcher, reason: str = "") -> None:
        """The same for a step whose srun is no child of ours: once its link is gone Slurm is asked if it is over."""
        pause = STEP_AGAIN_FIRST
        if not launcher.stepid:  # it had just been started
            await asyncio.wait([launcher.ready], timeout=self.settings.link_timeout)
        while True:
            await launcher.gone.wait()
            await asyncio.sleep(STEP_AGAIN_FIRST if launcher.leaving else pause)
            if launcher.link is not None:
                pause = STEP_AGAIN_FIRST
                continue
            if await self._is_step_over(allocation, launcher):
                break
            pause = min(2 * pause, STEP_AGAIN_LONGEST)
        self.drop(allocation, launcher, reason or f"its launcher's job step in job {allocation.jobid} ended")

    async def _is_step_over(self, allocation: Allocation, launcher: Launcher) -> bool:
        try:
            steps = await self._driver.steps(allocation.jobid)
        except GatewaySlurmError as error:
            self.log.info("job %s: its steps could not be listed: %s", allocation.jobid, error)
            return False
        return launcher.stepid not in {step.number for step in steps}

    @staticmethod
    def _step_error(launcher: Launcher, allocation: Allocation, error: GatewaySlurmError) -> GatewaySlurmError:
        if launcher.isolated and "nodes are busy" in str(error):
            return AllocationError(
                f"job {allocation.jobid} has no such share free now: {error}; stop an isolated kernel in it, "
                "or ask for fewer cpus, gpus or less memory",
                jobid=allocation.jobid,
            )
        return error

    def drop(self, allocation: Allocation, launcher: Launcher, reason: str) -> None:
        """The launcher is no more, and neither are its kernels."""
        launcher.release()  # where Slurm takes a job for over whose launcher still answers
        self._socket.forget(launcher.launcher_id)
        self._registry.remove_launcher(launcher.launcher_id)
        allocation.steps.pop(launcher.launcher_id, None)
        allocation.launchers.pop(launcher.launcher_id, None)
        launcher.fail(LauncherFailed(reason))
        for kernel in list(launcher.kernels.values()):
            kernel.ended_with_job(reason)

    def let_go(self, allocation: Allocation, launcher_id: str) -> None:
        """Another server has it now: its link here ends, and nothing is said on it."""
        reason = "another server has taken over its job"
        launcher = allocation.launchers.pop(launcher_id)
        for kernel in list(launcher.kernels.values()):
            kernel.ended_with_job(reason)  # whose start is under way
        launcher.fail(LauncherFailed(reason))
        self._socket.forget(launcher_id)
        following = allocation.steps.pop(launcher_id, None)
        if following is not None:
            following.cancel()

    # -- waiting ----------------------------------------------------------------------------

    async def wait_for(self, allocation: Allocation, launcher: Launcher) -> None:
        """Wait for the launcher, for as long as the job may wait and the launcher may dial."""
        waiter = asyncio.ensure_future(asyncio.shield(launcher.ready))
        deadline = asyncio.ensure_future(self._deadline(allocation, launcher))
        try:
            awaited: set[asyncio.Future[object]] = {waiter, allocation.ended, deadline}  # type: ignore[arg-type]
            await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
            # The end of the job fails ``ready``, too, but knows less of why.
            if allocation.ended.done():
                raise await self._why_no_launcher(allocation)
            if waiter.done():
                waiter.result()
            else:
                raise deadline.result()
        finally:
            waiter.cancel()
            deadline.cancel()

    async def _deadline(self, allocation: Allocation, launcher: Launcher) -> AllocationError | LauncherFailed:
        """Return the error that is due once the queue or the launcher took too long."""
        loop = asyncio.get_running_loop()
        begun, running_since = loop.time(), None
        while True:
            await asyncio.sleep(0.25)
            info = allocation.info
            if allocation.runs:
                running_since = running_since or loop.time()
                if loop.time() - running_since > self.settings.link_timeout:
                    return await self._never_came(allocation, launcher)
            elif info is not None and allocation.ours and (what_to_do := remedy(info.reason)):
                return AllocationError(
                    f"job {allocation.jobid} would wait in the queue for ever ({info.reason}); it was cancelled: "
                    f"{what_to_do}",
                    jobid=allocation.jobid,
                )
            elif self.settings.queue_timeout and loop.time() - begun > self.settings.queue_timeout:
                reason = f" ({info.reason})" if info is not None and info.reason else ""
                return QueueTimeout(
                    f"job {allocation.jobid} was still waiting in the queue{reason} after "
                    f"{self.settings.queue_timeout:g} s (SlurmService.queue_timeout); it was cancelled",
                    jobid=allocation.jobid,
                )

    def _log_of(self, allocation: Allocation) -> str:
        return f"{self.settings.log_dir}/launcher-{allocation.jobid}.log"

    async def _never_came(self, allocation: Allocation, launcher: Launcher) -> LauncherFailed:
        """It runs, and there is no link: say which addresses it tried in vain, where its log can be read."""
        log = self._log_of(allocation)
        where = f" on {allocation.info.nodes}" if allocation.info is not None else ""
        within = f"within {self.settings.link_timeout:g} s"
        if launcher.expected is not None and launcher.expected.refused:
            return NotProven(
                f"job {allocation.jobid} runs{where}, but its launcher was not let in {within}: "
                f"{launcher.expected.refused}; something on the way changes what is sent (its log on the node: {log})"
            )
        addresses = self._endpoints()
        why = "; ".join(dialled_in_vain(await self._log_end(log), addresses))
        return OutOfReach(
            f"job {allocation.jobid} runs{where}, but its launcher did not reach this server {within} at any of "
            f"{', '.join(addresses)}{f' ({why})' if why else ''}; set SlurmService.response_address to an address "
            f"that the compute nodes can dial (its log on the node: {log})"
        )

    async def _why_no_launcher(self, allocation: Allocation) -> AllocationError | LauncherFailed:
        """The job ended before its launcher dialled in: say why, in Slurm's words and the launcher's."""
        ended = allocation.ended.result()
        try:
            info = await self._driver.describe(allocation.jobid)
        except GatewaySlurmError:
            return ended
        if info.state not in ("FAILED", "COMPLETED"):
            return ended
        words = EXIT_MEANINGS.get(info.exit_code or 0, f"exit code {info.exit_code}")
        tail = "\n".join((await self._log_end(self._log_of(allocation))).splitlines()[-20:])
        return LauncherFailed(
            f"job {allocation.jobid} on {info.nodes} ended before its launcher was there: {words}"
            + (f"; its log ends:\n{tail}" if tail else ""),
            output_tail=tail,
        )
