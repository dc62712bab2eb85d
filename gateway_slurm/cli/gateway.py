"""``jupyter slurm gateway``: everything behind it is for the application, which has its own options."""

from __future__ import annotations

import argparse
import sys


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "gateway", help="serve kernels to many users (--help-all: every setting)", add_help=False
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the gateway until it is told to end."""
    # jsonschema, if it finds this, compiles a grammar for a format that no schema here has: 1.4 s of the 2.3 s
    # that a gateway needs until it can have its kernels again.
    sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]
    # Here, since it imports all of jupyter_server.
    from gateway_slurm.gateway.app import SlurmGatewayApp

    SlurmGatewayApp.launch_instance(arguments.rest)
    return 0
