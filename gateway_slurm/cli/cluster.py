"""``jupyter slurm cluster``: a private Slurm for trials and development.

Lines for the shell go to stdout and messages go to stderr, so that ``eval "$(jupyter slurm cluster up)"`` works.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

from gateway_slurm.testing import PrivateCluster


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``cluster up``, ``down`` and ``status``."""
    parser = subparsers.add_parser(
        "cluster",
        help="run a private Slurm on this machine, for trials",
        description="A real Slurm of your own on this machine. Once its packages are installed, it needs no root.",
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    _add_up(actions)
    for name, run, text in (
        ("status", _status, "show which daemons run, and the states of the nodes"),
        ("down", _down, "stop the cluster and its jobs, and remove its files"),
    ):
        action = actions.add_parser(name, help=text, description=f"{text.capitalize()}.")
        _add_directory(action)
        action.set_defaults(run=run)


def _add_up(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    up = actions.add_parser(
        "up",
        help="start the cluster, and print the lines that make Slurm's commands use it",
        description='Start the cluster. To use it: eval "$(jupyter slurm cluster up)"',
    )
    _add_directory(up)
    up.add_argument("--nodes", type=int, default=4, metavar="N", help="number of nodes (default: %(default)s)")
    up.add_argument("--gpus", type=int, default=2, metavar="N", help="simulated GPUs per node (default: %(default)s)")
    up.add_argument("--cpus", type=int, default=8, metavar="N", help="cores per node (default: %(default)s)")
    up.add_argument(
        "--accounting",
        action="store_true",
        help="with slurmdbd and MariaDB: the account 'demo' exists, and Slurm refuses all others",
    )
    up.add_argument("--rest", action="store_true", help="with slurmrestd, which takes tokens from 'scontrol token'")
    up.set_defaults(run=_up)


def _add_directory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "directory",
        metavar="DIR",
        nargs="?",
        type=Path,
        default=_default_directory(),
        help="the directory of its files (default: %(default)s)",
    )


def _default_directory() -> Path:
    """The user's state directory by the XDG base directory specification, and in it ``gateway_slurm/cluster``."""
    base = os.environ.get("XDG_STATE_HOME", "")
    state = Path(base) if Path(base).is_absolute() else Path.home() / ".local" / "state"
    return state / "gateway_slurm" / "cluster"


def _up(arguments: argparse.Namespace) -> int:
    cluster = PrivateCluster(
        arguments.directory,
        nodes=arguments.nodes,
        gpus_per_node=arguments.gpus,
        cpus=arguments.cpus,
        accounting=arguments.accounting,
        rest=arguments.rest,
    )
    if cluster.status().running:
        _say(f"The private cluster in {cluster.directory} is up already.")
    else:
        _say(f"Starting a private cluster in {cluster.directory} …")
        cluster.up()
        named = arguments.directory.absolute() != _default_directory()
        directory = f" {shlex.quote(str(arguments.directory.absolute()))}" if named else ""
        _say(f"It is up. Take it down with: jupyter slurm cluster down{directory}")
    if arguments.rest:
        _say(f"Its REST interface: SlurmService.cluster = {cluster.rest_url!r}")
    for name, value in cluster.environment().items():
        print(f"export {name}={shlex.quote(value)}")
    return 0


def _status(arguments: argparse.Namespace) -> int:
    cluster = PrivateCluster(arguments.directory)
    status = cluster.status()
    if not status.daemons:
        _say(f"There is no private cluster in {cluster.directory}.")
        return 1
    for name, alive in status.daemons.items():
        node = f", node {status.nodes[name]}" if name in status.nodes else ""
        print(f"{name}: {'running' if alive else 'not running'}{node}")
    return 0 if status.running else 1


def _down(arguments: argparse.Namespace) -> int:
    cluster = PrivateCluster(arguments.directory)
    if not cluster.down():
        _say(f"There is no private cluster in {cluster.directory}. Name the directory that 'cluster up' had.")
        return 1
    _say(f"The private cluster in {cluster.directory} is down.")
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr)
