"""Every error that this package raises on purpose.

    GatewaySlurmError
    ├── RequestError            the kernelspec or the client asked for something invalid
    │   └── NotAllowed          what is asked for is valid, and not allowed for this user
    ├── IdentityUnavailable     who is asking could not be found out
    ├── ConfigError             a setting of the admin's is wrong, or its file is
    ├── SlurmError              Slurm said no, or could not be asked
    │   ├── SlurmNotInstalled   the command is not there
    │   ├── SlurmUnavailable    it was asked and did not answer, or its controller is down
    │   │   ├── Unanswered      a command was under way, which may have done what it was to do
    │   │   └── SshError        its login node cannot be reached, or broke off
    │   │       ├── HostKeyRefused  the login node's key is unknown, changed or revoked
    │   │       ├── LoginRefused    the login node does not take our keys or passwords
    │   │       ├── SshTurnedAway   it ended the connection before it said who it is: it may have too many
    │   │       └── SshLost         it broke off while a command was under way, which may have been run
    │   ├── SubmitRefused       sbatch refused the job, in its own words
    │   └── UnknownJob          a healthy controller does not know the job id
    ├── AllocationError         the allocation cannot be used
    │   ├── AllocationEnded     it is over: TIMEOUT, CANCELLED, NODE_FAIL …
    │   └── QueueTimeout        it waited longer in the queue than allowed
    ├── KernelStartError        the launcher is there, the kernel did not come up
    │   ├── LauncherFailed      the launcher itself could not do its work on the node
    │   │   ├── CryptoMissing   its Python has no pycryptodome
    │   │   ├── OutOfReach      it reached none of the server's addresses
    │   │   └── NotProven       it came, and what it said did not prove that it was it
    │   ├── NodeUnreachable     it is to be direct, and its node cannot be dialled
    │   └── StartTimeout        the kernel did not listen in time
    ├── LinkError               a peer broke the protocol, or the link is gone
    │   └── HandshakeError      an unauthenticated peer did not prove who it is
    ├── StoreError              the store cannot be used as it is: its file, its key, its version
    │   └── StoreUnavailable    it takes or gives nothing now: worth another try
    └── ClusterError            the private Slurm for development and tests cannot do it

A message says what was asked, what came back (Slurm's own words), and what to do next.
HTTP statuses are chosen at the edge (the gateway), never here.
"""

from __future__ import annotations

from collections.abc import Sequence


class GatewaySlurmError(Exception):
    """The root of the tree; catching it catches everything that is raised on purpose."""


class RequestError(GatewaySlurmError):
    """A request field is missing, unknown or not valid; ``field`` names it."""

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class NotAllowed(RequestError):
    """What is asked for is valid, but not for this user; ``field`` names what they may not have."""


class IdentityUnavailable(GatewaySlurmError):
    """Whoever knows the users did not answer, or its answer is of no use: the request may be repeated."""


class ConfigError(GatewaySlurmError):
    """An admin's setting is wrong; the message names the file and the setting."""


class SlurmError(GatewaySlurmError):
    """A Slurm command failed; carries the command's name, its exit status and its own words."""

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
    """Slurm did not answer in time, or its controller is down: nothing is known about the jobs."""


class StepsUnknown(SlurmUnavailable):
    """Which steps run in a job is not told by the way in which Slurm is reached."""


class Unanswered(SlurmUnavailable):
    """A command was under way when its answer was lost, or it gave none: it may have done what it was to do."""


class SshError(SlurmUnavailable):
    """The login node could not be reached, or the connection to it broke: nothing is known about the jobs."""


class HostKeyRefused(SshError):
    """The host's key is not the one that known_hosts files have; the message says its fingerprint, and what to do."""


class LoginRefused(SshError):
    """No key, password or answer of ours was taken; the message says what was tried."""


class SshTurnedAway(SshError):
    """The login node took the connection and ended it before it said who it is: others may be logging in."""


class SshLost(SshError, Unanswered):
    """The connection broke while a command was under way: it may have been run."""


class SubmitRefused(SlurmError):
    """``sbatch`` refused the job."""


class UnknownJob(SlurmError):
    """The controller answered, and it does not know (or no longer knows) this job id."""


class AllocationError(GatewaySlurmError):
    """The allocation cannot be used for this kernel."""

    def __init__(self, message: str, *, jobid: str | None = None) -> None:
        super().__init__(message)
        self.jobid = jobid


class AllocationEnded(AllocationError):
    """The allocation is over; ``state`` is Slurm's word for how."""

    def __init__(self, message: str, *, jobid: str | None = None, state: str = "") -> None:
        super().__init__(message, jobid=jobid)
        self.state = state


class QueueTimeout(AllocationError):
    """The job waited in the queue for longer than ``queue_timeout``; it was cancelled."""


class KernelStartError(GatewaySlurmError):
    """The kernel did not come up on its node; ``output_tail`` is the end of what it printed."""

    def __init__(self, message: str, *, output_tail: str = "") -> None:
        super().__init__(message)
        self.output_tail = output_tail


class LauncherFailed(KernelStartError):
    """The launcher could not do its work on the node (no Python, no pycryptodome, no directory)."""


class NodeUnreachable(KernelStartError):
    """``connect = direct``, and its node cannot be dialled from here; names node, address and what came back."""


class CryptoMissing(LauncherFailed):
    """The launcher's Python has no pycryptodome, or one that is too old."""


class OutOfReach(LauncherFailed):
    """The job runs, and its launcher reached none of the server's addresses; the message says why, where known."""


class NotProven(LauncherFailed):
    """Somebody came under the launcher's name and could not say a HELLO that its token opens."""


class StartTimeout(KernelStartError):
    """The kernel did not listen on its channels within ``start_timeout``."""


class LinkError(GatewaySlurmError):
    """The peer broke the protocol, or the link is gone."""


class HandshakeError(LinkError):
    """A peer did not prove that it is one of our launchers."""


class StoreError(GatewaySlurmError):
    """The store cannot be used as it is; names it (never its password), the cause and what to do. It is left alone."""


class StoreUnavailable(StoreError):
    """The store takes or gives nothing at the moment: its disk is full, its server is away, somebody has it locked."""


class ClusterError(GatewaySlurmError):
    """The private Slurm cannot be brought up, used or taken down; names the daemon, with the end of its log."""
