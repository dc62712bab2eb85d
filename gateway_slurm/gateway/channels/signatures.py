"""The signatures of one kernel's messages, with the key that only the kernel and the server have.

A port of a kernel that ended may belong to another user's process now. What such a process sends has no valid
signature: it is not shown, and nothing in it is believed. Buffers are not signed.

Source: jupyter_client, "Messaging in Jupyter", section "The wire protocol".
"""

from __future__ import annotations

import hmac
from collections.abc import Generator, Sequence
from typing import Any, Final

from jupyter_client.session import DELIM

SLICE: Final = 1 << 20
"""Bytes that are hashed at once: about a millisecond."""
_SIGNED: Final = 4
"""Parts that are signed: header, parent header, metadata and content."""


REFUSED: Final = [b""]
"""Frames in the place of those that are not valid."""


class SignedParts(list[bytes]):
    """The parts of a message for the kernel that is signed already, since it is large."""

    signature: bytes = b""


class CheckedFrames(list[bytes]):
    """The frames of a large message with a valid signature."""


class Signatures:
    """Signs what is sent to a kernel, and checks what comes from it. ``kernel`` is its manager, which has the key.

    A server may be configured to use no key; then nothing is signed, and nothing is checked.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def sign(self, parts: Sequence[bytes]) -> bytes:
        """The signature of these parts."""
        if isinstance(parts, SignedParts):
            return parts.signature
        return bytes(self._kernel.session.sign(parts[:_SIGNED]))

    def is_valid(self, frames: Sequence[bytes]) -> bool:
        """Whether the kernel has sent this message."""
        if isinstance(frames, CheckedFrames):
            return True
        auth = self._kernel.session.auth
        try:
            at = frames.index(DELIM) + 1
            signature, parts = frames[at], frames[at + 1 : at + 1 + _SIGNED]
        except (ValueError, IndexError):
            return False
        if auth is None:  # no key
            return True
        # As ``Session.sign`` does, at once: there it takes each part on its own.
        hashed = auth.copy()
        hashed.update(b"".join(parts))
        return hmac.compare_digest(bytes(signature), hashed.hexdigest().encode())

    # -- large messages, in steps -----------------------------------------------------------------

    def checking(self, frames: list[bytes]) -> Generator[None, None, list[bytes]]:
        """Check a message in steps of about a millisecond; return its frames, or such as are not valid."""
        if not is_large(frames) or DELIM not in frames[:-1]:
            return frames if self.is_valid(frames) else REFUSED
        at = frames.index(DELIM) + 1
        signature = yield from self._hashing(frames[at + 1 :])
        is_valid = not self._kernel.session.key or hmac.compare_digest(bytes(frames[at]), signature)
        return CheckedFrames(frames) if is_valid else REFUSED

    def signing(self, parts: list[bytes]) -> Generator[None, None, list[bytes]]:
        """The parts, with their signature where they are large, in steps of about a millisecond."""
        if not is_large(parts):
            return parts
        signed = SignedParts(parts)
        signed.signature = yield from self._hashing(parts)
        return signed

    def _hashing(self, parts: Sequence[bytes]) -> Generator[None, None, bytes]:
        if self._kernel.session.auth is None:  # no key
            return b""
        hashed = self._kernel.session.auth.copy()
        for part in parts[:_SIGNED]:
            view = memoryview(part)
            for start in range(0, len(view), SLICE):
                hashed.update(view[start : start + SLICE])
                yield
        return bytes(hashed.hexdigest().encode())


def is_large(parts: Sequence[bytes]) -> bool:
    """Whether a message is signed and checked in steps."""
    return sum(map(len, parts)) > SLICE
