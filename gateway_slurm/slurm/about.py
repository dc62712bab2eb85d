"""What a cluster says of itself: its version and its partitions, by commands and by REST. Pure.

Sources: scontrol(1), sinfo(1), the OpenAPI documents of slurmrestd; outputs seen with Slurm 22.05.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from gateway_slurm.errors import SlurmUnavailable

_VERSION: Final = re.compile(r"^SLURM_VERSION\s*=\s*(\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Partition:
    """One that jobs can ask for."""

    name: str
    is_default: bool = False
    state: str = ""
    """In Slurm's word, ``up`` for one that runs jobs; empty where it does not say."""
    nodes: int | None = None

    def __str__(self) -> str:
        state = f" ({self.state})" if self.state not in ("", "up") else ""
        return f"{self.name}{'*' if self.is_default else ''}{state}"


@dataclass(frozen=True)
class About:
    """``version`` is the controller's; empty where it does not say."""

    version: str
    partitions: tuple[Partition, ...] = ()

    @property
    def default_partition(self) -> str | None:
        """The one of jobs that name none, or the only one there is; None where there is none, or nobody says."""
        names = [each.name for each in self.partitions if each.is_default]
        if not names and len(self.partitions) == 1:
            return self.partitions[0].name
        return names[0] if names else None


def config_command() -> list[str]:
    """Return scontrol's argv for the controller's configuration, which says its version."""
    return ["scontrol", "show", "config"]


def partitions_command() -> list[str]:
    """Return sinfo's argv: a line for each partition, its name with a star where it is the default."""
    return ["sinfo", "--noheader", "--summarize", "--format=%P|%a|%D"]


def parse_version(stdout: str) -> str:
    """Return the version in ``scontrol show config``."""
    found = _VERSION.search(stdout)
    return found[1] if found else ""


def parse_partitions(stdout: str) -> tuple[Partition, ...]:
    """Return the partitions in sinfo's answer."""
    rows = [line.split("|") for line in stdout.splitlines() if line.count("|") == 2]
    return tuple(
        Partition(name.removesuffix("*"), name.endswith("*"), state, int(nodes) if nodes.isdigit() else None)
        for name, state, nodes in rows
    )


def version_in(document: Mapping[str, Any]) -> str:
    """Return Slurm's version in an answer of slurmrestd's; its field is ``Slurm`` before 23.11, then ``slurm``."""
    meta = document.get("meta")
    for name in ("slurm", "Slurm"):
        part = meta.get(name) if isinstance(meta, dict) else None
        if isinstance(part, dict) and isinstance(part.get("release"), str):
            return str(part["release"])[:50]
    return ""


def partitions_in(document: Mapping[str, Any]) -> tuple[Partition, ...]:
    """Return an answer's ``partitions``; raise SlurmUnavailable for what is no list of them."""
    listed = document.get("partitions")
    if not isinstance(listed, list):
        raise SlurmUnavailable("slurmrestd's answer has no list of partitions in it")
    rows = [row for row in listed if isinstance(row, dict) and isinstance(row.get("name"), str)]
    # v0.0.38 has flags; later ones have none that says which is the default.
    return tuple(Partition(str(row["name"])[:255], "default" in (row.get("flags") or ())) for row in rows)
