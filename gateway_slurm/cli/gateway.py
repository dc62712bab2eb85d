"""``jupyter slurm gateway``: the shared gateway, a Jupyter application that parses its own options."""

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
    """Run the gateway until a signal ends it."""
    # If jsonschema finds this module, it compiles a grammar for a format that no schema here uses. That takes 1.4 s of
    # the 2.3 s after which a gateway can restore its kernels.
    sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]
    # Imported late, since it imports all of jupyter_server.
    from gateway_slurm.gateway.app import SlurmGatewayApp

    SlurmGatewayApp.launch_instance(arguments.rest)
    return 0
