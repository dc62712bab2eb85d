"""Every error that this package raises on purpose.

A message says what was asked, what came back (Slurm's own words), and what to do next. The gateway chooses HTTP
statuses; no error holds one.
"""

from __future__ import annotations

from collections.abc import Sequence


class GatewaySlurmError(Exception):
    """The root of the tree: everything that this package raises on purpose."""

    is_reported = False
    """Whether the user sees it already, so that no log needs its traceback."""


class RequestError(GatewaySlurmError):
    """A request field is missing, unknown or not valid; ``field`` is its name."""

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class NotAllowed(RequestError):
    """The request is valid, but not allowed for this user; ``field`` is the name of the field that is not allowed."""


class IdentityUnavailable(GatewaySlurmError):
    """The service that knows the users did not answer, or its answer is not usable; the client may try again."""


class ConfigError(GatewaySlurmError):
    """An admin's setting is wrong; the message names the file and the setting."""


class SlurmError(GatewaySlurmError):
    """A Slurm command failed; the error has its argv, its exit status and its standard error."""

    def __init__(
        self,
        message: str,
        *,
        argv: Sequence[str] = (),
        exit_status: int | None = None,
        stderr: str = "",
    ) -> None:
        super().__init__(message)
        self.argv = tuple(argv)
        self.exit_status = exit_status
        self.stderr = stderr


class SlurmNotInstalled(SlurmError):
    """The Slurm command was not found on this machine."""


class SlurmUnavailable(SlurmError):
    """Slurm did not answer in time, or its controller is down. The states of jobs are unknown."""


class StepsUnknown(SlurmUnavailable):
    """The access to Slurm does not show which steps run in a job."""


class Unanswered(SlurmUnavailable):
    """The answer to a command was lost, or the command gave none. Slurm may have carried it out."""


class SshError(SlurmUnavailable):
    """The login node could not be reached, or the connection to it broke. The states of jobs are unknown."""


class HostKeyRefused(SshError):
    """The host's key is not in the known_hosts files; the message has its fingerprint, and says what to do."""


class LoginRefused(SshError):
    """The login node accepted no key, password or answer; the message says what was tried."""


class SshTurnedAway(SshError):
    """sshd accepted the connection and closed it before its greeting: too many logins at a time (MaxStartups)."""


class SshLost(SshError, Unanswered):
    """The connection broke during a command, which may have run."""


class SubmitRefused(SlurmError):
    """``sbatch`` refused the job."""


class UnknownJob(SlurmError):
    """The controller answered that it does not know this job id, or no longer knows it."""


class AllocationError(GatewaySlurmError):
    """The allocation cannot be used for this kernel."""

    def __init__(self, message: str, *, jobid: str | None = None) -> None:
        super().__init__(message)
        self.jobid = jobid


class AllocationEnded(AllocationError):
    """The allocation is over; ``state`` is the job's final state in Slurm."""

    def __init__(self, message: str, *, jobid: str | None = None, state: str = "") -> None:
        super().__init__(message, jobid=jobid)
        self.state = state


class QueueTimeout(AllocationError):
    """The job waited in the queue for longer than ``queue_timeout`` and was cancelled."""


class KernelStartError(GatewaySlurmError):
    """The kernel did not start on its node; ``output_tail`` is the end of its output.

    ``brief`` is the message without the kernel's command line and output, for logs that must have neither.
    """

    def __init__(self, message: str, *, output_tail: str = "", brief: str = "") -> None:
        super().__init__(message)
        self.output_tail, self.brief = output_tail, brief


class LauncherFailed(KernelStartError):
    """The launcher failed on the node: no Python, no pycryptodome, no directory for logs."""


class NodeUnreachable(KernelStartError):
    """``connect = direct``, but this machine cannot dial the node; the message has node, address and error."""


class CryptoMissing(LauncherFailed):
    """The launcher's Python has no pycryptodome, or one that is too old."""


class OutOfReach(LauncherFailed):
    """The job runs, but its launcher reached none of the server's addresses; the message has the known reasons."""


class PrologTimeout(LauncherFailed):
    """Slurm's prolog ran on the node for longer than ``prolog_timeout``, and no script has begun."""


class NotProven(LauncherFailed):
    """A client claimed to be the launcher, but its HELLO could not be opened with the launch token."""


class NotEncrypted(KernelStartError):
    """The ports of a direct kernel do not speak CurveZMQ, which its kernelspec declares; the kernel was ended."""


class NoGreeting(KernelStartError):
    """A direct kernel listened and did not answer the check of its encryption; the kernel was ended."""


class StartTimeout(KernelStartError):
    """The kernel did not listen on its channels within ``start_timeout``."""


class LinkError(GatewaySlurmError):
    """The peer broke the protocol, or the link is gone."""


class MessageRefused(LinkError):
    """A launcher's message lacks a field without which it means nothing; the link stays."""


class HandshakeError(LinkError):
    """A peer did not prove that it is one of this server's launchers."""


class StoreError(GatewaySlurmError):
    """The store cannot be used, and is not changed; the message has its URL (without password), cause and remedy."""


class StoreUnavailable(StoreError):
    """The store cannot be read or written at the moment: full disk, database down, locked by another process."""


class ClusterError(GatewaySlurmError):
    """The private Slurm cannot be started, used or stopped; the message has the daemon and the end of its log."""
