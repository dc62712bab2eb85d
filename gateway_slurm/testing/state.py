"""The state of a private cluster, which one process saves for the next: a JSON file in the cluster's directory."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gateway_slurm.errors import ClusterError
from gateway_slurm.testing.layout import Layout
from gateway_slurm.testing.processes import Process

_NAME = "cluster.json"
_VERSION = 1


@dataclass
class State:
    """A cluster that is up, or the remains of one whose process died."""

    layout: Layout
    created_directory: bool
    processes: dict[str, Process] = field(default_factory=dict)

    def save(self) -> None:
        """Write the file atomically."""
        document = {"version": _VERSION, **asdict(self)}
        path = self.layout.directory / _NAME
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(document, indent=2, default=str), encoding="utf-8")
        temporary.replace(path)


def load(directory: Path) -> State | None:
    """The cluster in this directory, or None. Raises ClusterError for a file that is not a cluster's."""
    path = directory / _NAME
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ClusterError(f"{path} cannot be read: {error}") from error
    if document.get("version") != _VERSION:
        raise ClusterError(f"{path} was written by another version of gateway_slurm; remove {directory}")
    return State(
        layout=_layout(document["layout"]),
        created_directory=document["created_directory"],
        processes={name: Process(**process) for name, process in document["processes"].items()},
    )


def remove(directory: Path) -> None:
    """Remove the state file of this directory."""
    (directory / _NAME).unlink(missing_ok=True)


def _layout(document: dict[str, Any]) -> Layout:
    paths = {name: Path(document[name]) for name in ("directory", "runtime")}
    tuples = {name: tuple(document[name]) for name in ("node_ports", "slurm_version", "login_prefix", "node_prefix")}
    return Layout(**{**document, **paths, **tuples})
