"""Which server of a deployment has what: small questions, of columns only, so that nothing is unsealed for them.

Each takes an open connection. SQLAlchemy is imported here: import it late.
"""

from __future__ import annotations

import json
from typing import Any

import sqlalchemy as sa

from gateway_slurm.store.schema import ALLOCATIONS, KERNELS, SERVERS, SESSIONS

Owned = tuple[str, str]
"""The server's id, and the name of the user whose it is."""


def _in(table: sa.Table, deployment: str, *conditions: sa.ColumnElement[bool]) -> sa.Select[Any]:
    """Server and owner of the deployment's rows of a table."""
    joined = table.join(SERVERS, SERVERS.c.server_id == table.c.server_id)
    columns: sa.Select[Any] = sa.select(table.c.server_id, table.c.owner)
    return columns.select_from(joined).where(SERVERS.c.deployment == deployment, *conditions)


def _first(connection: sa.Connection, question: sa.Select[Any]) -> Owned | None:
    row = connection.execute(question.limit(1)).first()
    return None if row is None else (str(row[0]), str(row[1]))


def kernel(connection: sa.Connection, deployment: str, kernel_id: str) -> Owned | None:
    """Whose a kernel is; of one that still starts only its allocation knows."""
    found = _first(connection, _in(KERNELS, deployment, KERNELS.c.kernel_id == kernel_id))
    if found is not None:
        return found
    named = ALLOCATIONS.c.record.contains(f'"{kernel_id}"', autoescape=True)
    return _first(connection, _in(ALLOCATIONS, deployment, named))


def session(connection: sa.Connection, deployment: str, session_id: str) -> Owned | None:
    """Whose a session is."""
    return _first(connection, _in(SESSIONS, deployment, SESSIONS.c.session_id == session_id))


def session_at(connection: sa.Connection, deployment: str, owner: str, path: str) -> Owned | None:
    """Whose this user's session of this document is."""
    mine = _in(SESSIONS, deployment, SESSIONS.c.owner == owner).add_columns(SESSIONS.c.record)
    for server_id, name, record in connection.execute(mine):
        if json.loads(record).get("path") == path:
            return str(server_id), str(name)
    return None


def kernel_owners(connection: sa.Connection, deployment: str, but: str) -> dict[str, str]:
    """The owner of each kernel of the deployment, starting ones included, but for the server ``but``."""
    starting = _in(ALLOCATIONS, deployment, ALLOCATIONS.c.server_id != but).add_columns(ALLOCATIONS.c.record)
    running = _in(KERNELS, deployment, KERNELS.c.server_id != but).add_columns(KERNELS.c.kernel_id)
    owners = {
        str(kernel_id): str(owner)
        for _server, owner, record in connection.execute(starting)
        for kernel_id in json.loads(record).get("kernel_ids", ())
    }
    return owners | {str(kernel_id): str(owner) for _server, owner, kernel_id in connection.execute(running)}
