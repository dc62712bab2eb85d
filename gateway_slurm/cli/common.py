"""What several commands of ``jupyter slurm`` share: tables, errors of standard output, blocking access to Slurm."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from gateway_slurm.slurm.access import ClusterAccess

T = TypeVar("T")


def print_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Print rows of text below a header, in columns as wide as their longest cell."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


# -- standard output that nothing reads any more, as after ``| head`` ------------------------------------


def flush_output() -> None:
    """Write what is buffered, so that an error is raised here and not at Python's end, where no code can handle it."""
    if sys.stdout is not None:  # None if the parent process closed it
        sys.stdout.flush()


def discard_output() -> None:
    """After a write error: send all further output to /dev/null, so that it cannot fail again."""
    if sys.stdout is None:
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


# -- Slurm -----------------------------------------------------------------------------------------------


class BlockingSlurm:
    """Blocking access to Slurm as the process's own user; no launcher is linked to this process.

    ``run`` uses one event loop for all questions, since a connection belongs to the loop that made it. The end of the
    ``with`` block closes ``access`` and the loop.
    """

    def __init__(self, access: ClusterAccess) -> None:
        self.access = access
        self._loop = asyncio.new_event_loop()
        self.driver = access.driver(access.user)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine of ``driver`` to its end; return its result, or raise its error."""
        return self._loop.run_until_complete(coroutine)

    def __enter__(self) -> BlockingSlurm:
        return self

    def __exit__(self, *_error: object) -> None:
        try:
            self.run(self.access.close())
            self.run(_cancel_all())
            self.run(self._loop.shutdown_default_executor())
        finally:
            self._loop.close()


async def _cancel_all() -> None:
    """Cancel the tasks that are left, as after Ctrl-C."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
