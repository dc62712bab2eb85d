"""Starting a launcher in an allocation, as the job's own script or as a job step, and waiting for it."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from gateway_slurm._util import Backoff
from gateway_slurm.addresses import failed_dials
from gateway_slurm.allocations.identity import COMMENT, JOB_NAME, STEP_NAME, TOKEN_VARIABLE, new_launcher_id
from gateway_slurm.allocations.launcher import UNKNOWN_NODE, Launcher, moment
from gateway_slurm.allocations.model import Allocation, Place
from gateway_slurm.allocations.monitor import AllocationMonitor
from gateway_slurm.allocations.stages import Stage, StageClock, stage_of
from gateway_slurm.allocations.table import OwnerContext
from gateway_slurm.errors import (
    AllocationError,
    GatewaySlurmError,
    LauncherFailed,
    NotProven,
    OutOfReach,
    PrologTimeout,
    QueueTimeout,
)
from gateway_slurm.link.program import launcher_program
from gateway_slurm.link.server import Expected
from gateway_slurm.request import KernelRequest
from gateway_slurm.slurm.account import Account
from gateway_slurm.slurm.driver import StepProcess
from gateway_slurm.slurm.model import ClusterInfo, JobSpec, StepSpec
from gateway_slurm.slurm.names import file_of, job_name
from gateway_slurm.slurm.script import job_script
from gateway_slurm.store.records import LauncherRecord

# After a launcher's link is lost: the first pause before Slurm is asked whether its step is over, and the longest.
STEP_RETRY_DELAY, MAX_STEP_RETRY_DELAY = 0.5, 30.0
TOKEN_BYTES = 32
MAX_SIGNAL_SECONDS = 65535  # sbatch(1), --signal
# Slurm may send its signal a minute early, and looks at its jobs twice a minute.
SIGNAL_SLACK = 120.0


def signal_seconds(warnings: Sequence[float], minutes: float | None) -> int | None:
    """How many seconds before its end a job of ``minutes`` (None: no limit) asks for Slurm's signal.

    The largest of the warnings (in minutes) that does not come with the job's start; None where there is none.
    """
    fitting = [60 * warning for warning in warnings if minutes is None or 60 * warning + SIGNAL_SLACK <= 60 * minutes]
    return min(int(max(fitting)), MAX_SIGNAL_SECONDS) if fitting and max(fitting) >= 1 else None


@dataclass(frozen=True)
class DialAddresses:
    """The addresses that launchers dial, as they are at the time of the call."""

    first: Callable[[], list[str]]
    """This server's own addresses, for a launcher's first dial."""
    later: Callable[[], list[str]]
    """The addresses of all servers that may take its kernels over, for all later dials."""


class LauncherStarter:
    """Makes launchers and waits for them. Lives on the service's loop."""

    def __init__(
        self,
        context: OwnerContext,
        monitor: AllocationMonitor,
        addresses: DialAddresses,
        *,
        log_end: Callable[[str], Awaitable[str | None]],
        cluster_info: Callable[[], Awaitable[ClusterInfo]],
    ) -> None:
        self._driver, self._socket, self._table = context.driver, context.socket, context.table
        self._registry, self.log = context.table.registry, context.log
        self._settings, self._monitor = context.settings, monitor
        self._owner, self._user = context.owner, context.user
        self._addresses, self._log_end, self._cluster_info = addresses, log_end, cluster_info

    def register(self, allocation: Allocation, *, isolated: bool = False) -> Launcher:
        """Return a new launcher of ``allocation``, which may dial in from now on."""
        launcher = self._new(allocation, new_launcher_id(self._registry.store_id))
        launcher.isolated, launcher.holds_job = isolated, allocation.ours and not allocation.jobid
        launcher.tokens = secrets.token_bytes(TOKEN_BYTES), secrets.token_bytes(TOKEN_BYTES)
        launcher.epoch = self._registry.epoch
        launcher.expected = self._expect(launcher)
        allocation.add_launcher(launcher)
        return launcher

    def _new(self, allocation: Allocation, launcher_id: str) -> Launcher:
        return Launcher(
            launcher_id,
            allocation,
            self._settings,
            addresses=self._addresses.later,
            events=self._monitor.events(allocation),
            log=self.log,
        )

    def restore(self, allocation: Allocation, record: LauncherRecord) -> Launcher:
        """Return the launcher on record. It may dial in once ``allow_reconnect`` is called."""
        launcher = self._new(allocation, record.launcher_id)
        launcher.tokens, launcher.epoch, launcher.slots = record.tokens, record.epoch, dict(record.slots)
        launcher.isolated, launcher.holds_job, launcher.stepid = record.isolated, record.holds_job, record.stepid
        launcher.jobid, launcher.restored = allocation.jobid, bool(record.node)
        launcher.set_nodes(record.nodelist)
        launcher.end_time = moment(record.end_time)
        launcher.node = record.node or UNKNOWN_NODE
        allocation.add_launcher(launcher)
        return launcher

    def allow_reconnect(self, launcher: Launcher) -> None:
        """Let a restored launcher dial in. Its kernels are known by now, so none is stopped as an unknown one."""
        launcher.expected = self._expect(launcher)
        launcher.set_jobid(launcher.jobid)

    def _expect(self, launcher: Launcher) -> Expected:
        return self._socket.expect(launcher.launcher_id, launcher.tokens, launcher, user=self._owner)

    def job(self, launcher: Launcher, request: KernelRequest, account: Account, place: Place) -> JobSpec:
        """The job that has ``launcher`` as its script; its name is that of its first kernel."""
        return JobSpec(
            name=self._name(request, place),
            comment=f"{COMMENT}{launcher.launcher_id}",
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
            signal_seconds=signal_seconds(self._settings.walltime_warnings, request.minutes),
            propagate=self._settings.propagate,
            script=self._script(launcher, keep=request.keep_allocation),
            env={**account.environment, TOKEN_VARIABLE: launcher.tokens[0].hex()},
        )

    def _name(self, request: KernelRequest, place: Place) -> str:
        values = {
            "notebook": file_of(place.session_name) or place.kernelspec,
            "kernelspec": place.kernelspec,
            "project": request.project or "",
            "user": self._owner or self._user,
        }
        return job_name(self._settings.job_name, values, JOB_NAME)

    def _script(self, launcher: Launcher, *, keep: bool = False, share: KernelRequest | None = None) -> str:
        timeout = f"{self._settings.orphan_timeout:g}"
        in_script, in_step = "keep" if keep else "job", "isolated" if launcher.isolated else "step"
        role = in_script if launcher.holds_job else in_step
        gres, memory = (",".join(share.gres_list), share.memory or "") if share else ("", "")
        return job_script(
            launcher_program(),
            pythons=self._settings.launcher_python,
            log_dir=self._settings.log_directory,
            arguments=[launcher.launcher_id, ",".join(self._addresses.first()), timeout, role, gres, memory],
        )

    async def start_step(
        self, allocation: Allocation, node: str | None, request: KernelRequest | None
    ) -> tuple[Launcher, StepProcess]:
        """Start a launcher as a job step; for an isolated kernel's ``request``, a step with an exact share.

        Raises AllocationEnded or SlurmError; the launcher is removed then.
        """
        launcher = self.register(allocation, isolated=request is not None)
        launcher.named_node = node
        launcher.set_jobid(allocation.jobid)
        spec = StepSpec(
            jobid=allocation.jobid,
            node=node,
            name=STEP_NAME,
            script=self._script(launcher, share=request),
            exact=request is not None,
            cpus=(request.cpus or 1) if request else None,
            memory=request.memory if request else None,
            gres=request.gres_list if request else (),
            propagate=self._settings.propagate,
            env={TOKEN_VARIABLE: launcher.tokens[0].hex()},
        )
        try:
            await self.wait_until_running(allocation)
            self._table.record_launcher(allocation, launcher)
            await self._registry.flushed()
            step = await self._driver.start_step(spec)
        except BaseException:
            # Other starts may be waiting for this launcher already.
            self._table.remove_launcher(allocation, launcher, f"no launcher could be started in job {allocation.jobid}")
            raise
        return launcher, step

    async def wait_until_running(self, allocation: Allocation) -> None:
        """Return when the job runs.

        Raises AllocationEnded when it ends instead, and AllocationError when it can never start.
        """
        while not allocation.is_running:
            if allocation.ended.done():
                raise allocation.ended.result()
            if allocation.never_starts:
                raise _never_starts(allocation, allocation.never_starts)
            await asyncio.sleep(0.2)  # reads memory only: the watcher asks Slurm, for all jobs at once

    async def watch_step(self, allocation: Allocation, launcher: Launcher, step: StepProcess) -> None:
        """Wait until a launcher that is a step of its own has ended, and remove it: its srun ends with it.

        An srun that is killed leaves its step running. A launcher that was up then counts until Slurm says that the
        step is over.
        """
        reason = f"its launcher's job step in job {allocation.jobid} ended"
        try:
            await step.wait()
        except GatewaySlurmError as error:
            reason = f"its launcher's job step in job {allocation.jobid} failed: {error}"
            if launcher.isolated and "nodes are busy" in str(error):
                error = AllocationError(
                    f"job {allocation.jobid} has no such share free now: {error}; stop an isolated kernel in it, "
                    "or ask for fewer cpus, gpus or less memory",
                    jobid=allocation.jobid,
                )
            launcher.fail(error)
            if launcher.was_up:
                await self.watch_restored_step(allocation, launcher, reason)
                return
            await launcher.gone.wait()
        self._table.remove_launcher(allocation, launcher, reason)

    async def watch_restored_step(self, allocation: Allocation, launcher: Launcher, reason: str = "") -> None:
        """The same without an srun of this process: once the link is lost, Slurm is asked whether the step is over."""
        backoff = Backoff(STEP_RETRY_DELAY, MAX_STEP_RETRY_DELAY)
        if not launcher.stepid:  # the step had just been started
            await asyncio.wait([launcher.ready], timeout=self._settings.link_timeout)
        while True:
            await launcher.gone.wait()
            await asyncio.sleep(STEP_RETRY_DELAY if launcher.leaving else backoff.next())
            if launcher.link is not None:
                backoff.reset()
            elif await self._is_step_over(allocation, launcher):
                break
        self._table.remove_launcher(
            allocation, launcher, reason or f"its launcher's job step in job {allocation.jobid} ended"
        )

    async def _is_step_over(self, allocation: Allocation, launcher: Launcher) -> bool:
        try:
            steps = await self._driver.steps(allocation.jobid)
        except GatewaySlurmError as error:
            self.log.info("job %s: its steps could not be listed: %s", allocation.jobid, error)
            return False
        return launcher.stepid not in {step.number for step in steps}

    # -- Waiting for a launcher --

    async def wait_for(self, allocation: Allocation, launcher: Launcher) -> None:
        """Wait until the launcher is linked, within ``queue_timeout`` and ``link_timeout``.

        Raises AllocationError or LauncherFailed, with the reason.
        """
        deadline = asyncio.ensure_future(self._deadline(allocation, launcher))
        try:
            awaited: set[asyncio.Future[object]] = {launcher.ready, allocation.ended, deadline}  # type: ignore[arg-type]
            await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
            # The end of the job fails ``ready``, too, but with less of a reason.
            if allocation.ended.done():
                raise await self._why_no_launcher(allocation)
            if not launcher.ready.done():
                raise deadline.result()
            launcher.ready.result()
        finally:
            deadline.cancel()
            allocation.set_late("")

    async def _deadline(self, allocation: Allocation, launcher: Launcher) -> AllocationError | LauncherFailed:
        """Return the error to raise, once the queue, the prolog or the launcher took too long.

        Each has its own clock. None runs while nodes boot or PrologSlurmctld runs: Slurm's ResumeTimeout limits the
        boot. The launcher's clock begins when its script does, as far as that can be seen.
        """
        clock, script = StageClock(asyncio.get_running_loop().time), _ScriptStart(self._settings.link_timeout)
        if _is_prolog_over(allocation, launcher):
            script.prolog = ""
        while True:
            await asyncio.sleep(0.25)
            stage = stage_of(allocation)
            seconds = clock.spend(stage)
            if stage is Stage.QUEUE and (why := allocation.never_starts or await self._wrong_size(allocation)):
                return _never_starts(allocation, why)
            if stage is Stage.QUEUE and self._settings.queue_timeout and seconds > self._settings.queue_timeout:
                return self._queued_too_long(allocation)
            if stage is Stage.PROLOG:
                script.prolog = ""  # Slurm says when it ends
                if seconds > self._settings.prolog_timeout:
                    return _prolog_too_long(allocation, seconds)
            if stage is Stage.RUNNING:
                await self._look_for_script(allocation, launcher, script, seconds)
                if seconds > script.deadline(self._settings.prolog_timeout):
                    return await self._never_came(allocation, launcher, script, seconds)

    async def _look_for_script(
        self, allocation: Allocation, launcher: Launcher, script: _ScriptStart, seconds: float
    ) -> None:
        """Look for the script's log and, once the launcher is late without one, ask Slurm whether it has a prolog."""
        if launcher.holds_job and script.is_look_due(seconds):
            script.looked(seconds, await self._log_end(self._log_of(allocation)))
        if not script.is_prolog_asked_for(seconds):
            return
        script.asked = True
        try:
            script.prolog = (await self._cluster_info()).prolog
        except GatewaySlurmError as error:
            self.log.info("Slurm does not say whether it has a prolog: %s", error)
        if script.prolog != "":
            program = (
                f"its prolog {script.prolog}" if script.prolog else "a prolog (it is not known whether there is one)"
            )
            why = (
                f"perhaps {program} still runs, or its node does not reach this server at "
                f"{', '.join(self._addresses.first())}; this server waits {self._settings.prolog_timeout:g} s more "
                "(SlurmService.prolog_timeout)"
            )
            allocation.set_late(why)
            self.log.warning("job %s runs without its launcher: %s", allocation.jobid, why)

    async def _wrong_size(self, allocation: Allocation) -> str:
        """Why the job has too many nodes for its partition, or too few; empty if it has not, or that is not known.

        Slurm has one reason for such a job and for nodes that are down (squeue(1)). It is asked once for an allocation.
        """
        info, nodes, name = allocation.info, allocation.request.nodes, allocation.partition
        if allocation.size_checked or info is None or info.reason != "PartitionNodeLimit" or "," in name:
            return ""
        allocation.mark_size_checked()
        try:
            found = [each for each in (await self._cluster_info()).partitions if each.name == name]
        except GatewaySlurmError as error:
            self.log.info("Slurm does not say how many nodes partition %s has: %s", name, error)
            return ""
        if not nodes or not found or found[0].allows(nodes):
            return ""
        limits = [limit for limit in (found[0].nodes, found[0].max_nodes) if limit is not None]
        most = f" to {min(limits)}" if limits else " or more"
        sizes = f"{found[0].min_nodes or 1}{most}"
        return f"PartitionNodeLimit: ask for another number of nodes ({sizes}) or another partition"

    def _queued_too_long(self, allocation: Allocation) -> QueueTimeout:
        info = allocation.info
        reason = f" ({info.reason})" if info is not None and info.reason else ""
        advice = f"; {info.pending.advice}" if info is not None and info.pending.advice else ""
        return QueueTimeout(
            f"job {allocation.jobid} was still waiting in the queue{reason} after "
            f"{self._settings.queue_timeout:g} s (SlurmService.queue_timeout); it was cancelled{advice}",
            jobid=allocation.jobid,
        )

    def _log_of(self, allocation: Allocation) -> str:
        return f"{self._settings.log_directory}/launcher-{allocation.jobid}.log"

    async def _never_came(
        self, allocation: Allocation, launcher: Launcher, script: _ScriptStart, seconds: float
    ) -> LauncherFailed:
        """The error for a job that runs without a link: what is known, and then the possible causes in their order."""
        log = self._log_of(allocation)
        where = f" on {allocation.info.nodes}" if allocation.info is not None else ""
        within = f"within {seconds if script.began is None else self._settings.link_timeout:.3g} s"
        if launcher.expected is not None and launcher.expected.refused:
            return NotProven(
                f"job {allocation.jobid} runs{where}, but its launcher was not accepted {within}: "
                f"{launcher.expected.refused}; something on the way changes what is sent, or another process has "
                f"dialled with its id and it did not reach this server itself (its log on the node: {log})"
            )
        addresses = self._addresses.first()
        failed = "; ".join(failed_dials(await self._log_end(log) or "", addresses))
        dial = "set SlurmService.response_address to an address that the compute nodes can dial"
        slow = "Python starts slowly there: raise SlurmService.link_timeout"
        program = f"the prolog {script.prolog}" if script.prolog else "a prolog"
        prolog = f"{program} still ran: raise SlurmService.prolog_timeout"
        if failed:
            known, causes = failed, [dial]
        elif script.began is not None:
            known, causes = f"its script began {seconds - script.began:.0f} s ago", [slow, dial]
        else:
            known = "its log cannot be read here, so it is not known whether its script has begun"
            # Where Slurm does not show whether there is a prolog, one of several minutes is the rarest cause.
            not_shown = [dial, slow, prolog] if script.prolog is None else [dial, slow]
            causes = [prolog, dial, slow] if script.prolog else not_shown
        what_to_do = causes[0] if len(causes) == 1 else "possible causes, the likeliest first: " + "; ".join(causes)
        return OutOfReach(
            f"job {allocation.jobid} runs{where}, but its launcher did not reach this server {within} at any of "
            f"{', '.join(addresses)} ({known}); {what_to_do} (its log on the node: {log})"
        )

    async def _why_no_launcher(self, allocation: Allocation) -> AllocationError | LauncherFailed:
        """The error for a job that ended before its launcher dialled in, in Slurm's words and the launcher's."""
        ended = allocation.ended.result()
        try:
            info = await self._driver.describe(allocation.jobid)
        except GatewaySlurmError:
            return ended
        if info.state not in ("FAILED", "COMPLETED"):
            return ended
        exit_text = f"exit code {info.exit_code}"
        if info.exit_code == 127:  # the job script's own (slurm/script.py)
            exit_text = "no Python was found on the node: name an installed one in SlurmService.launcher_python"
        tail = "\n".join((await self._log_end(self._log_of(allocation)) or "").splitlines()[-20:])
        return LauncherFailed(
            f"job {allocation.jobid} on {info.nodes} ended before its launcher was up: {exit_text}"
            + (f"; its log ends:\n{tail}" if tail else ""),
            output_tail=tail,
        )


class _ScriptStart:
    """When the job's script began, in seconds of the stage RUNNING: its first act is to make its log.

    Slurm calls a job RUNNING while the prolog runs on its node, and says so only with PrologFlags=Alloc.
    """

    def __init__(self, link_timeout: float) -> None:
        self._link_timeout = link_timeout
        self._interval = self._next_look = max(1.0, link_timeout / 8)
        self.began: float | None = None
        self.asked = False
        self.prolog: str | None = None
        """The program that may still run; empty where none does, and None where that is not known."""

    def is_prolog_asked_for(self, seconds: float) -> bool:
        """Whether Slurm should be asked now, once, for its prolog."""
        return not self.asked and self.prolog is None and self.began is None and seconds > self._link_timeout

    def is_look_due(self, seconds: float) -> bool:
        """Whether the log should be looked for now."""
        return self.began is None and seconds >= self._next_look

    def looked(self, seconds: float, log: str | None) -> None:
        """Take the log's end; None where there is no log, or none that this server can read."""
        self._next_look = seconds + self._interval
        if log is not None:
            self.began = seconds

    def deadline(self, prolog_timeout: float) -> float:
        """The second in which the launcher is late."""
        if self.began is not None:
            return self.began + self._link_timeout
        return self._link_timeout + (0.0 if self.prolog == "" else prolog_timeout)


def _is_prolog_over(allocation: Allocation, launcher: Launcher) -> bool:
    """Whether the launcher is a step on nodes where another launcher was up: the prolog runs once a job and node.

    A TaskProlog runs again, within ``link_timeout``.
    """
    nodes = [launcher.named_node] if launcher.named_node else allocation.nodes
    return not launcher.holds_job and bool(nodes) and allocation.begun_nodes.issuperset(nodes)


def _prolog_too_long(allocation: Allocation, seconds: float) -> PrologTimeout:
    where = f" on {allocation.info.nodes}" if allocation.info is not None else ""
    return PrologTimeout(
        f"Slurm has run its prolog for job {allocation.jobid}{where} for {seconds:.0f} s, and the job's script has not "
        "begun; ask the admin what the prolog waits for, or raise SlurmService.prolog_timeout"
    )


def _never_starts(allocation: Allocation, why: str) -> AllocationError:
    """The error for a job that Slurm keeps pending for a reason that waiting does not end."""
    outcome = "it was cancelled" if allocation.ours else "name another job, or none"
    return AllocationError(
        f"job {allocation.jobid} would wait in the queue indefinitely; {outcome} ({why})",
        jobid=allocation.jobid,
    )
