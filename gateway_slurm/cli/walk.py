"""The walk of ``jupyter slurm doctor``: its options, and what it prints."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import math
import signal
import sys
from collections.abc import Callable

from gateway_slurm.cli.output import discard_output
from gateway_slurm.cli.walkpath import Walk
from gateway_slurm.cli.walkspec import OPTIONS, Asked
from gateway_slurm.cli.walksteps import Outcome
from gateway_slurm.printable import printable
from gateway_slurm.request import FIELDS

WALK_FAILED = 3


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that say what is asked for."""
    group = parser.add_argument_group(
        "the walk", "A job is submitted and a kernel started in it, as the user's are; both are ended again."
    )
    group.add_argument("--walk", action=argparse.BooleanOptionalAction, default=True, help="walk (the default)")
    group.add_argument("--only-walk", action="store_true", help="walk, and look for nothing that is left")
    group.add_argument(
        "--kernelspec",
        default="",
        metavar="NAME",
        help="take everything from this kernelspec, or from a path of its directory; without it and without "
        "--project the first one with slurm-provisioner is taken",
    )
    helps = {each.name: each.help for each in FIELDS}
    for name in OPTIONS:
        group.add_argument(f"--{name.replace('_', '-')}", dest=f"field_{name}", metavar="VALUE", help=helps[name])
    group.add_argument("--user", default="", help="whose kernel it is to be, where run_as is user (default: yours)")
    group.add_argument(
        "--wait",
        type=_seconds,
        default=Asked.wait,
        metavar="SECONDS",
        help=f"how long the job may wait in the queue before it is cancelled (default: {Asked.wait:g})",
    )
    group.add_argument("--verbose", action="store_true", help="show the log, too")


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (seconds := float(text)) < math.inf:
            return seconds
    raise argparse.ArgumentTypeError("seconds are a number above 0")


def walk(arguments: argparse.Namespace) -> Walk:
    """Walk as the options say; what is done is printed as it goes, unless it is for programs."""
    fields = {name: value for name in OPTIONS if (value := getattr(arguments, f"field_{name}")) is not None}
    asked = Asked(arguments.kernelspec, fields, arguments.user, arguments.wait)
    show: Callable[[str], None] = (lambda _line: None) if arguments.json else _show

    def tell(outcome: Outcome) -> None:
        for line in outcome.lines():
            show(line)

    walking = Walk(asked, tell=tell, note=lambda line: show(f"{'':<17}{line}"), log=_log(verbose=arguments.verbose))
    asyncio.run(_run(walking))
    return walking


def _show(line: str) -> None:
    try:
        print(printable(line), flush=True)
    except BrokenPipeError:
        # As Ctrl-C, so that the job goes with the walk.
        discard_output()
        signal.raise_signal(signal.SIGINT)


async def _run(walking: Walk) -> None:
    """Walk; a signal that ends programs ends it in good order."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, task.cancel)
    await walking.run()


def _log(*, verbose: bool) -> logging.Logger:
    """What goes wrong is told by the steps; the log is for who wants to see more."""
    log = logging.getLogger("gateway_slurm.walk")
    log.propagate = False
    handler: logging.Handler = logging.StreamHandler(sys.stderr) if verbose else logging.NullHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    return log
