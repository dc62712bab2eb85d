"""The steps of the doctor's walk, which of them an error belongs to, and what to change then: tables."""

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
    QueueTimeout,
    RequestError,
    SlurmNotInstalled,
    SlurmUnavailable,
    SshError,
    StoreError,
    SubmitRefused,
)

STEPS: Final[dict[str, str]] = {
    "settings": "settings, and what is asked for",
    "login": "the way to Slurm",
    "slurm": "Slurm answers",
    "server": "store and response socket",
    "submit": "a job is accepted",
    "run": "it runs",
    "dial": "its launcher dials back",
    "python": "the launcher's Python",
    "crypto": "the link is encrypted",
    "kernel": "a kernel starts",
    "execute": "it answers 1+1",
    "end": "nothing is left",
}
"""In the order in which they are walked."""

_ERRORS: Final[tuple[tuple[type[GatewaySlurmError], str], ...]] = (
    (CryptoMissing, "python"),
    (OutOfReach, "dial"),
    (NotProven, "crypto"),
    (LauncherFailed, "python"),
    (KernelStartError, "kernel"),
    (AllocationError, "run"),
    (SubmitRefused, "submit"),
    (RequestError, "settings"),
    (ConfigError, "settings"),
)
"""Where an error of a kernel's start belongs; any other is of the step that was under way."""

_CHANGES: Final[tuple[tuple[str, type[GatewaySlurmError], str], ...]] = (
    ("settings", ConfigError, "the setting that is named, in jupyter_slurm_config.py"),
    ("settings", NotAllowed, "--user NAME, of a user who may have kernels"),
    (
        "settings",
        RequestError,
        "the kernel.json of --kernelspec, or the option of that name (--project, --partition …)",
    ),
    ("login", HostKeyRefused, "the known_hosts file, or SlurmService.ssh_known_hosts"),
    ("login", LoginRefused, "SlurmService.ssh_identity_files, ssh_password_file, or the user in SlurmService.cluster"),
    ("login", SlurmNotInstalled, "SlurmService.slurm_path, or SlurmService.cluster where Slurm is elsewhere"),
    ("login", SshError, "SlurmService.cluster; ssh_config, ssh_python and ssh_timeout, if it is reached"),
    ("login", SlurmUnavailable, "SlurmService.cluster; rest_token_file or rest_token_command, if it is the token"),
    ("slurm", SlurmNotInstalled, "SlurmService.slurm_path"),
    (
        "slurm",
        SlurmUnavailable,
        "have slurmctld (and munge) seen to; SlurmService.slurm_conf, if that is another cluster's; rest_token_file or "
        "rest_token_command, if it is the token",
    ),
    ("slurm", RequestError, "--partition, with the name of one of these"),
    ("server", StoreError, "SlurmService.store_url and store_key_file"),
    ("server", SshError, "SlurmService.relay_port and relay"),
    ("server", LinkError, "SlurmService.response_port and response_interface"),
    (
        "submit",
        SubmitRefused,
        "what Slurm names: --partition, --project (the account), --qos, --reservation, --nodes …",
    ),
    ("submit", SlurmUnavailable, "have slurmctld seen to"),
    ("run", QueueTimeout, "--wait for longer, or ask for another partition or less (squeue --start says until when)"),
    ("run", AllocationEnded, "what Slurm names; sacct and slurmctld's log say more"),
    ("run", AllocationError, "the options that it names"),
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
    ("python", LauncherFailed, "SlurmService.launcher_python; log_directory, if it cannot be written"),
    (
        "crypto",
        NotProven,
        "what is between the nodes and SlurmService.response_address: it must pass bytes on unchanged",
    ),
    ("kernel", KernelStartError, "the kernel's command in its kernelspec; SlurmService.start_timeout, if it is slow"),
    (
        "execute",
        KernelStartError,
        "connect = 'tunnel', if the node cannot be dialled from here; else see the kernel's log",
    ),
    ("end", AllocationError, "have slurmctld seen to; squeue --me, scancel"),
)


@dataclass(frozen=True)
class Outcome:
    """Of one step; ``seconds`` is what it took, ``change`` what is to be changed where it failed."""

    step: str
    ok: bool
    said: str
    seconds: float
    change: str = ""

    def row(self) -> dict[str, Any]:
        """For programs."""
        found = {name: getattr(self, name) for name in ("step", "ok", "said", "change")}
        return {**found, "title": STEPS[self.step], "seconds": round(self.seconds, 3)}

    def lines(self) -> list[str]:
        """For people."""
        first, *more = self.said.splitlines() or [""]
        lines = [f"{'ok' if self.ok else 'FAILED':<7}{self.seconds:6.1f} s  {STEPS[self.step]}: {first}"]
        lines += [f"{'':<17}{line}" for line in more]
        return lines + ([f"{'':<17}change: {self.change}"] if self.change else [])


def step_of(error: GatewaySlurmError, under_way: str) -> str:
    """The step at which a walk that is at ``under_way`` failed by this error."""
    if under_way in ("settings", "login", "slurm", "server", "execute", "end"):
        return under_way
    return next((step for kind, step in _ERRORS if isinstance(error, kind)), under_way)


def change_for(step: str, error: GatewaySlurmError) -> str:
    """What to change; empty where only the error itself says."""
    return next((text for at, kind, text in _CHANGES if at == step and isinstance(error, kind)), "")


def steps_table() -> str:
    """Draw the steps as markdown, one line each."""
    lines = ["| step | if it fails, change |", "|---|---|"]
    for step, title in STEPS.items():
        changes = dict.fromkeys(text.replace("|", "\\|") for at, _kind, text in _CHANGES if at == step)
        lines.append(f"| {title} | {'<br>'.join(changes)} |")
    return "\n".join(lines) + "\n"
