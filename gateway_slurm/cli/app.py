"""``jupyter slurm``: run a subcommand and turn errors into messages.

A subcommand is a module with ``add_parser(subparsers)``, which sets ``run`` to a function that takes the parsed
arguments and returns the exit status. List it in ``_SUBCOMMANDS``.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence

from gateway_slurm import __version__
from gateway_slurm._util import printable
from gateway_slurm.cli import allocations, attach, cluster, gateway, logs, token
from gateway_slurm.cli.common import discard_output, flush_output
from gateway_slurm.cli.doctor import findings as doctor
from gateway_slurm.errors import GatewaySlurmError

_SUBCOMMANDS = (allocations, attach, cluster, doctor, gateway, logs, token)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(prog="jupyter slurm", description="Jupyter kernels on Slurm compute nodes.")
    parser.add_argument("--version", action="version", version=f"gateway_slurm {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in _SUBCOMMANDS:
        module.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``jupyter slurm``; return the command's exit status, 1 after an error. A wrong command line exits with 2."""
    try:
        try:
            return _run(argv)
        finally:
            flush_output()
    except BrokenPipeError:  # the reader has closed the pipe, as head does
        discard_output()
        return 1
    except OSError as error:  # such as a full disk
        discard_output()
        return _failed(error)
    except GatewaySlurmError as error:
        return _failed(error)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _failed(error: Exception) -> int:
    print(f"jupyter slurm: {printable(error)}", file=sys.stderr)
    return 1


def _run(argv: Sequence[str] | None) -> int:
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.run is not gateway.run:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.rest = rest
    run: Callable[[argparse.Namespace], int] = arguments.run
    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
