"""A Jupyter server's sessions, on record: a notebook finds its kernel again after the server's restart.

jupyter_server has its own in a database in memory; its file would know kernels that no server has.
"""

from __future__ import annotations

from typing import Any

from jupyter_server.services.sessions.sessionmanager import SessionManager

from gateway_slurm.gateway.sessionrecords import SessionRecords
from gateway_slurm.store.records import SessionRecord


class SlurmSessionManager(SessionManager):
    """Jupyter server's, with each session of a kernel on Slurm on record."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.records = SessionRecords(self.kernel_manager, self._restore)

    def _restore(self, records: list[SessionRecord]) -> None:
        for one in records:
            known = self.cursor.execute("SELECT 1 FROM session WHERE session_id=?", (one.session_id,)).fetchone()
            if known is None:
                row = one.session_id, one.path or None, one.name or None, one.type or None, one.kernel_id
                self.cursor.execute("INSERT INTO session VALUES (?,?,?,?,?)", row)

    def _record(self, session_id: str) -> None:
        row = self.cursor.execute("SELECT * FROM session WHERE session_id=?", (session_id,)).fetchone()
        if row is None:
            self.records.remove(session_id)
            return
        path, name, kind, kernel_id = (str(row[key] or "") for key in ("path", "name", "type", "kernel_id"))
        self.records.put(SessionRecord(session_id=session_id, path=path, name=name, type=kind, kernel_id=kernel_id))

    async def save_session(self, session_id: str, *args: Any, **kwargs: Any) -> Any:
        """Also on record."""
        model = await super().save_session(session_id, *args, **kwargs)
        self._record(session_id)
        return model

    async def update_session(self, session_id: str, **kwargs: Any) -> None:
        """Also on record."""
        await super().update_session(session_id, **kwargs)
        self._record(session_id)

    async def delete_session(self, session_id: str) -> None:
        """Also on record."""
        await super().delete_session(session_id)
        self._record(session_id)

    async def row_to_model(self, row: Any, tolerate_culled: bool = False) -> Any:
        """One whose kernel is gone is gone from the record, too."""
        if row["kernel_id"] not in self.kernel_manager:
            self.records.remove(row["session_id"])
        return await super().row_to_model(row, tolerate_culled)
