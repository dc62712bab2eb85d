"""Where sessions are on record: in the service's registry, with the kernels that they belong to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gateway_slurm.gateway.restoring import KernelRestorer
from gateway_slurm.service import SlurmService
from gateway_slurm.store.records import SessionRecord


class SessionRecords:
    """One session manager's records. ``restore`` is called with those of sessions whose kernels are there again."""

    def __init__(self, kernel_manager: Any, restore: Callable[[list[SessionRecord]], None]) -> None:
        restorer = getattr(kernel_manager, "restorer", None)
        self._restorer = restorer if isinstance(restorer, KernelRestorer) else None
        if self._restorer is not None:
            self._restorer.on_sessions.append(restore)

    def put(self, record: SessionRecord) -> None:
        """Have it on record, new or changed."""
        if self._is_kept:
            SlurmService.instance().registry.put_session(record)

    def remove(self, session_id: str) -> None:
        """It is over."""
        if self._is_kept:
            SlurmService.instance().registry.remove_session(session_id)

    @property
    def _is_kept(self) -> bool:
        """Whether records are this server's to change."""
        restorer = self._restorer
        return restorer is not None and restorer.is_keeping and not SlurmService.instance().is_closed
