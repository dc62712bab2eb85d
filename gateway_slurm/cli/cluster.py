"""``jupyter slurm cluster``: a private Slurm to try things on.

What a shell is to evaluate goes to stdout, everything said to people to stderr, so that
``eval "$(jupyter slurm cluster up)"`` works.
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
        help="a private Slurm on this machine, to try things on",
        description="A real Slurm of your own on this machine; no root needed once its packages are there.",
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    _add_up(actions)
    for name, run, text in (
        ("status", _status, "say which daemons run, and the nodes' states"),
        ("down", _down, "stop it with its jobs, and remove its files"),
    ):
        action = actions.add_parser(name, help=text, description=f"{text.capitalize()}.")
        _add_directory(action)
        action.set_defaults(run=run)


def _add_up(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    up = actions.add_parser(
        "up",
        help="start it, and print the line that makes Slurm's commands use it",
        description='Start it; use it with: eval "$(jupyter slurm cluster up)"',
    )
    _add_directory(up)
    up.add_argument("--nodes", type=int, default=4, metavar="N", help="nodes (default: %(default)s)")
    up.add_argument("--gpus", type=int, default=2, metavar="N", help="pretended GPUs per node (default: %(default)s)")
    up.add_argument("--cpus", type=int, default=8, metavar="N", help="cores per node (default: %(default)s)")
    up.add_argument(
        "--accounting",
        action="store_true",
        help="with slurmdbd on a MariaDB of its own: the account 'demo' exists, others are refused",
    )
    up.add_argument("--rest", action="store_true", help="with slurmrestd, for tokens by 'scontrol token'")
    up.set_defaults(run=_up)


def _add_directory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "directory",
        metavar="DIR",
        nargs="?",
        type=Path,
        default=_default_directory(),
        help="where its files are (default: %(default)s)",
    )


def _default_directory() -> Path:
    """A directory of this user's, by the XDG base directory specification."""
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
        _say("It is up. Take it down with: jupyter slurm cluster down")
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
    if cluster.down():
        _say(f"The private cluster in {cluster.directory} is down.")
    else:
        _say(f"There is no private cluster in {cluster.directory}.")
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr)
