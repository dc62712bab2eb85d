"""Tables of the path check: its steps, the step that an error belongs to, and what to change when a step fails."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from gateway_slurm.errors import (
    AllocationEnded,
    AllocationError,
    ConfigError,
    CryptoMissing,
    GatewaySlurmError,
    HostKeyRefused,
    KernelStartError,
    LauncherFailed,
    LinkError,
    LoginRefused,
    NotAllowed,
    NotProven,
    OutOfReach,
    PrologTimeout,
    QueueTimeout,
    RequestError,
    SlurmNotInstalled,
    SlurmUnavailable,
    SshError,
    StoreError,
    SubmitRefused,
)

STEPS: Final[dict[str, str]] = {
    "settings": "settings and request fields",
    "login": "access to Slurm",
    "slurm": "Slurm answers",
    "server": "store and response socket",
    "submit": "Slurm accepts a job",
    "run": "the job runs",
    "dial": "the launcher dials back",
    "python": "the launcher's Python",
    "crypto": "the link is encrypted",
    "kernel": "the kernel starts",
    "execute": "the kernel answers 1+1",
    "end": "nothing is left behind",
}
"""In the order in which they are checked."""

CLIENT_STEPS: Final[dict[str, str]] = {
    "client": "settings of the Jupyter server",
    "name": "the gateway's name",
    "connect": "a connection",
    "tls": "the gateway's certificate",
    "token": "the gateway knows you",
    "kernelspecs": "kernelspecs",
    "start": "a kernel starts",
    "websocket": "a websocket; the kernel answers 1+1",
    "delete": "nothing is left behind",
}
"""The steps of the check of a gateway's client, in the order in which they are checked."""

_ERRORS: Final[tuple[tuple[type[GatewaySlurmError], str], ...]] = (
    (CryptoMissing, "python"),
    (OutOfReach, "dial"),
    (NotProven, "crypto"),
    (PrologTimeout, "run"),
    (LauncherFailed, "python"),
    (KernelStartError, "kernel"),
    (AllocationError, "run"),
    (SubmitRefused, "submit"),
    (RequestError, "settings"),
    (ConfigError, "settings"),
)
"""The step that an error of a kernel's start belongs to; any other error belongs to the current step."""

_CHANGES: Final[tuple[tuple[str, type[GatewaySlurmError], str], ...]] = (
    ("settings", ConfigError, "the setting that the message names, in jupyter_slurm_config.py"),
    ("settings", NotAllowed, "--user: name a user who may have kernels"),
    (
        "settings",
        RequestError,
        "the field in the kernel.json of --kernelspec, or the option of that name (--project, --partition …)",
    ),
    ("login", HostKeyRefused, "the known_hosts file, or SlurmService.ssh_known_hosts"),
    ("login", LoginRefused, "SlurmService.ssh_identity_files, ssh_password_file, or the user in SlurmService.cluster"),
    ("login", SlurmNotInstalled, "SlurmService.slurm_path, or SlurmService.cluster if Slurm is on another machine"),
    ("login", SshError, "SlurmService.cluster; if the login node answers, ssh_config, ssh_python or ssh_timeout"),
    ("login", SlurmUnavailable, "SlurmService.cluster; if the token is wrong, rest_token_file or rest_token_command"),
    ("slurm", SlurmNotInstalled, "SlurmService.slurm_path"),
    (
        "slurm",
        SlurmUnavailable,
        "check slurmctld and munge; if slurm.conf is another cluster's, SlurmService.slurm_conf; if the token is "
        "wrong, rest_token_file or rest_token_command",
    ),
    ("slurm", RequestError, "--partition: name one of the listed partitions"),
    ("server", StoreError, "SlurmService.store_url and store_key_file"),
    ("server", SshError, "SlurmService.relay_port and relay"),
    ("server", LinkError, "SlurmService.response_port and response_interface"),
    (
        "submit",
        SubmitRefused,
        "what Slurm's message names: --partition, --project (the account), --qos, --reservation, --nodes …",
    ),
    ("submit", SlurmUnavailable, "check slurmctld"),
    (
        "run",
        QueueTimeout,
        "a longer --wait, another partition, or a smaller request (squeue --start shows the expected start)",
    ),
    ("run", PrologTimeout, "the cluster's Prolog (slurm.conf), or SlurmService.prolog_timeout"),
    ("run", AllocationEnded, "what Slurm's message names; sacct and slurmctld's log say more"),
    ("run", AllocationError, "the options that the message names"),
    (
        "dial",
        OutOfReach,
        "SlurmService.response_address, response_port or response_interface, or relay (docs/admins/networks.md)",
    ),
    (
        "python",
        CryptoMissing,
        "pip install 'pycryptodome>=3.23' for a Python of the nodes; SlurmService.launcher_python",
    ),
    ("python", LauncherFailed, "SlurmService.launcher_python; log_directory, if the user cannot write there"),
    (
        "crypto",
        NotProven,
        "the forwarding between the nodes and SlurmService.response_address: it must pass bytes on unchanged",
    ),
    (
        "kernel",
        KernelStartError,
        "the kernel's command in its kernelspec; SlurmService.start_timeout, if the kernel is slow",
    ),
    (
        "execute",
        KernelStartError,
        "connect = 'tunnel', if this machine cannot dial the node; otherwise see the kernel's log",
    ),
    ("end", AllocationError, "check slurmctld; find the job with squeue --me and end it with scancel"),
)


INDENT: Final = 17 * " "
"""Before a line that belongs to the step above it."""


@dataclass(frozen=True)
class StepResult:
    """The result of one step, which took ``seconds``; ``change`` says what to change where it failed."""

    step: str
    ok: bool
    message: str
    seconds: float
    change: str = ""

    @property
    def title(self) -> str:
        return (STEPS | CLIENT_STEPS)[self.step]

    def row(self) -> dict[str, Any]:
        """The JSON that ``--json`` prints."""
        return {
            "step": self.step,
            "ok": self.ok,
            "said": self.message,
            "change": self.change,
            "title": self.title,
            "seconds": round(self.seconds, 3),
        }

    def lines(self) -> list[str]:
        """The lines that are printed without ``--json``."""
        first, *more = self.message.splitlines() or [""]
        lines = [f"{'ok' if self.ok else 'FAILED':<7}{self.seconds:6.1f} s  {self.title}: {first}"]
        more += [f"change: {self.change}"] if self.change else []
        return [*lines, *(INDENT + line for line in more)]


def step_of(error: GatewaySlurmError, current: str) -> str:
    """The step that failed with ``error``, given the step that the check has reached."""
    if current in ("settings", "login", "slurm", "server", "execute", "end"):
        return current
    return next((step for kind, step in _ERRORS if isinstance(error, kind)), current)


def change_for(step: str, error: GatewaySlurmError) -> str:
    """What to change; empty where the error's message says it."""
    return next((text for name, kind, text in _CHANGES if name == step and isinstance(error, kind)), "")
