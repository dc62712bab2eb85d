"""Sessions: each connects a user's document with a kernel. They are on record, and end with their kernel.

The gateway has its own session manager, in memory. A Jupyter server keeps jupyter_server's, and puts sessions with
kernels on Slurm on record, so that a notebook finds its kernel again after the server's restart.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any, Final
from weakref import WeakValueDictionary

from jupyter_server.services.contents.manager import AsyncContentsManager
from jupyter_server.services.sessions.sessionmanager import SessionManager
from tornado import web

from gateway_slurm.gateway.restore import KernelRestorer
from gateway_slurm.service import SlurmService
from gateway_slurm.store.records import SessionRecord

MAX_SESSIONS: Final = 1000
"""Sessions of one user: a kernel may have many."""


class SessionRecords:
    """The records of one session manager. ``restore`` is called with the records of restored kernels' sessions."""

    def __init__(self, kernel_manager: Any, restore: Callable[[list[SessionRecord]], None]) -> None:
        restorer = getattr(kernel_manager, "restorer", None)
        self._restorer = restorer if isinstance(restorer, KernelRestorer) else None
        if self._restorer is not None:
            self._restorer.on_sessions.append(restore)

    def put(self, record: SessionRecord) -> None:
        if self._is_kept:
            SlurmService.instance().registry.put(record)

    def remove(self, session_id: str) -> None:
        if self._is_kept:
            SlurmService.instance().registry.remove("sessions", session_id)

    @property
    def _is_kept(self) -> bool:
        """Whether this server may change records."""
        restorer = self._restorer
        return restorer is not None and restorer.is_keeping and not SlurmService.instance().is_closed


class NoContents(AsyncContentsManager):
    """The contents manager that jupyter_server requires; a gateway has no files."""

    def get_extra_handlers(self) -> list[Any]:
        return []


class GatewaySessionManager(SessionManager):
    """The gateway's sessions; two users' documents of the same path are two sessions."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sessions: dict[str, SessionRecord] = {}
        self._records = SessionRecords(self.kernel_manager, self._restore)
        self._locks: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()

    def lock(self, path: str, owner: str) -> asyncio.Lock:
        """The lock to hold while looking for this user's session of this document, and creating it."""
        return self._locks.setdefault((path, owner), asyncio.Lock())

    def _restore(self, records: list[SessionRecord]) -> None:
        self._sessions = {record.session_id: record for record in records} | self._sessions

    def all(self) -> list[SessionRecord]:
        """The sessions with a kernel; others are removed."""
        for session in list(self._sessions.values()):
            if session.kernel_id not in self.kernel_manager:
                self.remove(session.session_id)
        return list(self._sessions.values())

    def find(self, session_id: str) -> SessionRecord | None:
        session = self._sessions.get(session_id)
        if session is not None and session.kernel_id not in self.kernel_manager:
            self.remove(session_id)
            return None
        return session

    def at(
        self, path: str, owner: str, is_visible: Callable[[SessionRecord], bool] = lambda _session: True
    ) -> SessionRecord | None:
        """The user's session of this document, of those that are visible."""
        found = (session for session in self.all() if (session.path, session.owner) == (path, owner))
        return next(filter(is_visible, found), None)

    def check_limit(self, owner: str) -> None:
        """Raise HTTPError 429 if the user has as many sessions as there may be."""
        if sum(session.owner == owner for session in self.all()) >= MAX_SESSIONS:
            raise web.HTTPError(
                429, f"you have {MAX_SESSIONS} sessions, and there may be no more: shut some down first"
            )

    def put(self, session: SessionRecord) -> None:
        """Add a session, or replace it by one with another document or kernel."""
        self._sessions[session.session_id] = session
        self._records.put(session)

    def remove(self, session_id: str) -> None:
        if self._sessions.pop(session_id, None) is not None:
            self._records.remove(session_id)

    def model(self, session: SessionRecord) -> dict[str, Any]:
        return session_model(session, self.kernel_manager.kernel_model(session.kernel_id))


def session_model(session: SessionRecord, kernel: dict[str, Any]) -> dict[str, Any]:
    """A session as the sessions API represents it, with its kernel's model."""
    document = {"path": session.path, "name": session.name}
    model = {"id": session.session_id, **document, "type": session.type, "kernel": kernel}
    return {**model, "notebook": document} if session.type == "notebook" else model


def session_env(path: str, name: str) -> dict[str, str]:
    """What a session adds to its kernel's environment: its document's path, as Jupyter servers do."""
    return {"JPY_SESSION_NAME": os.path.join(os.path.dirname(path), name) if name else path}


class SlurmSessionManager(SessionManager):
    """Jupyter server's session manager, which puts each session of a kernel on Slurm on record.

    It changes the record after each change of a session, and deletes it with the kernel.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.records = SessionRecords(self.kernel_manager, self._restore)

    def _restore(self, records: list[SessionRecord]) -> None:
        for record in records:
            known = self.cursor.execute("SELECT 1 FROM session WHERE session_id=?", (record.session_id,)).fetchone()
            if known is None:
                optional = (record.path or None, record.name or None, record.type or None)
                row = record.session_id, *optional, record.kernel_id
                self.cursor.execute("INSERT INTO session VALUES (?,?,?,?,?)", row)

    def _record(self, session_id: str) -> None:
        row = self.cursor.execute("SELECT * FROM session WHERE session_id=?", (session_id,)).fetchone()
        if row is None:
            self.records.remove(session_id)
            return
        path, name, kind, kernel_id = (str(row[key] or "") for key in ("path", "name", "type", "kernel_id"))
        self.records.put(SessionRecord(session_id=session_id, path=path, name=name, type=kind, kernel_id=kernel_id))

    async def save_session(self, session_id: str, *args: Any, **kwargs: Any) -> Any:
        model = await super().save_session(session_id, *args, **kwargs)
        self._record(session_id)
        return model

    async def update_session(self, session_id: str, **kwargs: Any) -> None:
        await super().update_session(session_id, **kwargs)
        self._record(session_id)

    async def delete_session(self, session_id: str) -> None:
        await super().delete_session(session_id)
        self._record(session_id)

    async def row_to_model(self, row: Any, tolerate_culled: bool = False) -> Any:
        if row["kernel_id"] not in self.kernel_manager:
            self.records.remove(row["session_id"])
        return await super().row_to_model(row, tolerate_culled)
