"""Standard output that nobody reads any more, as when it goes to ``head``."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Coroutine
from typing import Any, TypeVar

from gateway_slurm.slurm.access import ClusterAccess


def flush_output() -> None:
    """What is still to be written fails here, and not at Python's end, where nobody can handle it."""
    if sys.stdout is not None:  # closed by whoever started us
        sys.stdout.flush()


def discard_output() -> None:
    """After an error of writing: what is printed from now on goes nowhere, and fails no more."""
    if sys.stdout is None:
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


# -- Slurm as the commands of ``jupyter slurm`` ask it. --


T = TypeVar("T")


class OwnSlurm:
    """As the process's own user, on a loop of its own; no launcher is linked to this process.

    A connection, or a client, belongs to the loop that it was made on: there is one for all questions, until the
    ``with`` ends that this is used in. ``access`` is closed then.
    """

    def __init__(self, access: ClusterAccess) -> None:
        self._access = access
        self._loop = asyncio.new_event_loop()
        self.driver = access.driver(access.user)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run what asks ``driver``."""
        return self._loop.run_until_complete(coroutine)

    def __enter__(self) -> OwnSlurm:
        return self

    def __exit__(self, *_error: object) -> None:
        try:
            self.run(self._access.close())
            self.run(_cancel_all())
            self.run(self._loop.shutdown_default_executor())
        finally:
            self._loop.close()


async def _cancel_all() -> None:
    """Tasks that were left, as by Ctrl-C."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
