"""Sessions: a document's name for its kernel, each its user's own; on record, and over with its kernel."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any
from weakref import WeakValueDictionary

from jupyter_server.services.contents.manager import AsyncContentsManager
from jupyter_server.services.sessions.sessionmanager import SessionManager

from gateway_slurm.gateway.restore import KernelRestorer
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


# -- Sessions: a document's name for its kernel, each its user's own; on record, and over with its kernel. --


class NoContents(AsyncContentsManager):
    """A gateway has no files: this stands where jupyter_server wants a contents manager."""

    def get_extra_handlers(self) -> list[Any]:
        return []


@dataclass
class Session:
    """One document's session."""

    session_id: str
    path: str
    name: str
    type: str
    kernel_id: str
    owner: str


class GatewaySessionManager(SessionManager):
    """The gateway's sessions; two users' documents of the same path are two sessions."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sessions: dict[str, Session] = {}
        self._records = SessionRecords(self.kernel_manager, self._restore)
        self._locks: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()

    def lock(self, path: str, owner: str) -> asyncio.Lock:
        """To be held while this user's session of this document is looked for, and made if there is none."""
        return self._locks.setdefault((path, owner), asyncio.Lock())

    def _restore(self, records: list[SessionRecord]) -> None:
        for one in records:
            session = Session(one.session_id, one.path, one.name, one.type, one.kernel_id, one.owner)
            self._sessions.setdefault(one.session_id, session)

    def all(self) -> list[Session]:
        """Those whose kernel is there; the others are forgotten."""
        for session in list(self._sessions.values()):
            if session.kernel_id not in self.kernel_manager:
                self.remove(session.session_id)
        return list(self._sessions.values())

    def find(self, session_id: str) -> Session | None:
        return next((session for session in self.all() if session.session_id == session_id), None)

    def at(self, path: str, owner: str) -> Session | None:
        """The user's session of this document."""
        return next((one for one in self.all() if one.path == path and one.owner == owner), None)

    def add(self, *, path: str, name: str, type: str, kernel_id: str, owner: str) -> Session:  # noqa: A002 - the API's word
        session = Session(str(uuid.uuid4()), path, name, type, kernel_id, owner)
        self._sessions[session.session_id] = session
        self.changed(session)
        return session

    def changed(self, session: Session) -> None:
        """It has another document, or kernel."""
        self._records.put(SessionRecord(**asdict(session)))

    def remove(self, session_id: str) -> None:
        if self._sessions.pop(session_id, None) is not None:
            self._records.remove(session_id)

    def model(self, session: Session) -> dict[str, Any]:
        """As the sessions API has it."""
        model: dict[str, Any] = {
            "id": session.session_id,
            "path": session.path,
            "name": session.name,
            "type": session.type,
            "kernel": self.kernel_manager.kernel_model(session.kernel_id),
        }
        if session.type == "notebook":
            model["notebook"] = {"path": session.path, "name": session.name}
        return model


def session_env(path: str, name: str) -> dict[str, str]:
    """What a session adds to its kernel's environment: its document's path, as Jupyter servers have it."""
    return {"JPY_SESSION_NAME": os.path.join(os.path.dirname(path), name) if name else path}


# -- A Jupyter server's sessions, on record: a notebook finds its kernel again after the server's restart. --


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
