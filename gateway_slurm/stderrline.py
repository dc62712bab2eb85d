"""A line on a kernel's stderr stream that the kernel did not write: Jupyter's ``stream`` message.

See "Messaging in Jupyter", ``stream``: clients take it for the kernel's if it is signed with the kernel's
key, and show it under the cell whose ``execute_request`` is its parent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from jupyter_client.session import Session

# ipykernel's topic for it; clients subscribe to everything.
TOPIC = b"stream.stderr"


class StderrLine:
    """One message, for connections that may have different parents."""

    def __init__(self, text: str, connection: Mapping[str, str]) -> None:
        self._session = Session(
            key=connection.get("key", "").encode(),
            signature_scheme=connection.get("signature_scheme", "hmac-sha256"),
        )
        self._message = self._session.msg("stream", {"name": "stderr", "text": text})

    def frames(self, parent: bytes) -> Sequence[bytes]:
        """The message's frames; ``parent`` is a header as JSON, empty for none."""
        message = {**self._message, "parent_header": _header(parent)}
        return [bytes(frame) for frame in self._session.serialize(message, ident=TOPIC)]


def _header(parent: bytes) -> dict[str, object]:
    """A header that is JSON; another packer's, which is not read here, is no parent."""
    try:
        header = json.loads(parent)
    except (ValueError, RecursionError):
        return {}
    return header if isinstance(header, dict) else {}
