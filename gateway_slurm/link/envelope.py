"""The encryption of a link: HPKE in PSK mode (RFC 9180). Both ends use this file.

Suite: DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-256-GCM. The server makes a receiver key for each connection; the
launcher encapsulates to it, with its launch token as PSK. So the token authenticates both sides, an opening that is
replayed on another connection cannot be opened, and recorded traffic stays sealed if a token leaks later.

The HPKE context seals frames from launcher to server. Frames from server to launcher are AES-256-GCM with counter
nonces, under a key that the launcher draws and sends inside the sealed hello (``export`` of the context would also do,
but pycryptodome has it only since 4.0).

Needs pycryptodome >= 3.23.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from typing import Any

from Crypto.Cipher import AES
from Crypto.Protocol import HPKE
from Crypto.Protocol.DH import import_x25519_public_key
from Crypto.PublicKey import ECC

from gateway_slurm.link import wire

Sealing = Callable[[bytes], bytes]

_SUITE = HPKE.AEAD.AES256_GCM


class _CounterGcm:
    """AES-256-GCM frames in order; the nonce is their count (SP 800-38D, 8.2.1)."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._count = 0

    def _cipher(self) -> Any:
        nonce = self._count.to_bytes(12, "big")
        self._count += 1
        return AES.new(self._key, AES.MODE_GCM, nonce=nonce, mac_len=wire.TAG_BYTES)

    def seal(self, plain: bytes) -> bytes:
        text, tag = self._cipher().encrypt_and_digest(plain)
        return bytes(text + tag)

    def unseal(self, sealed: bytes) -> bytes:
        view = memoryview(sealed)
        cut = max(len(sealed) - wire.TAG_BYTES, 0)
        return bytes(self._cipher().decrypt_and_verify(view[:cut], view[cut:]))


def checked(unseal: Sealing) -> Sealing:
    """``unseal`` that raises WireError for every failure of the cipher: the frame does not come from the peer."""

    def unseal_or_refuse(sealed: bytes) -> bytes:
        try:
            return unseal(sealed)
        except ValueError as error:
            raise wire.WireError("the link's key does not open a frame") from error

    return unseal_or_refuse


class ReceiverKey:
    """The server's key for one connection."""

    def __init__(self) -> None:
        self._key = ECC.generate(curve="Curve25519")
        self.public: bytes = self._key.public_key().export_key(format="raw")

    def open_hello(self, opening: wire.Opening, tokens: Sequence[bytes]) -> tuple[dict[str, Any], Sealing, Sealing]:
        """Return hello, seal and unseal of this link; raise WireError if no token opens the hello.

        ``tokens`` are the valid ones: two, until the launcher has confirmed the successor.
        """
        enc, sealed = opening.proof[: wire.KEY_BYTES], opening.proof[wire.KEY_BYTES :]
        info = wire.binding(opening.jobid, opening.launcher_id, self.public)
        for token in tokens:
            try:
                context = HPKE.new(
                    receiver_key=self._key,
                    aead_id=_SUITE,
                    enc=enc,
                    psk=(opening.launcher_id.encode(), token),
                    info=info,
                )
                hello = json.loads(context.unseal(sealed))
                down_key = bytes.fromhex(hello.pop("down_key"))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                continue
            if len(down_key) == wire.KEY_BYTES:
                return hello, _CounterGcm(down_key).seal, checked(context.unseal)
        raise wire.WireError("none of the launcher's tokens opens its HELLO")


def seal_hello(
    public_key: bytes, token: bytes, launcher_id: str, jobid: str, hello: dict[str, Any]
) -> tuple[wire.Opening, Sealing, Sealing]:
    """The launcher's side: return the opening to send, and seal and unseal of this link."""
    context = HPKE.new(
        receiver_key=import_x25519_public_key(public_key),
        aead_id=_SUITE,
        psk=(launcher_id.encode(), token),
        info=wire.binding(jobid, launcher_id, public_key),
    )
    down_key = os.urandom(wire.KEY_BYTES)
    sealed = context.seal(json.dumps({**hello, "down_key": down_key.hex()}).encode())
    opening = wire.Opening(wire.HELLO, launcher_id, jobid, context.enc + sealed)
    return opening, context.seal, checked(_CounterGcm(down_key).unseal)
