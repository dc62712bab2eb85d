"""CurveZMQ's client (ZeroMQ RFC 26), for subscribing to a direct kernel on its own node. No I/O.

The kernel's public key is the server's. Kernels let in whoever knows it: ipykernel and jupyter_client set no
ZAP handler that would look at clients' keys, so ours is drawn for the connection.

A box is NaCl's crypto_box: X25519, XSalsa20 and Poly1305. Of a nonce's 24 bytes the first 16 are the same for
all messages in one direction, and so is the key that HSalsa20 makes of them. What is only kept is not
decrypted: a frame's first bytes show its flags, and it is authenticated when somebody reads it.
"""

from __future__ import annotations

import os
import struct
from typing import Any

from Crypto.Cipher import Salsa20
from Crypto.Hash.Poly1305 import Poly1305_MAC
from Crypto.Protocol.DH import import_x25519_public_key, key_agreement
from Crypto.PublicKey import ECC

from gateway_slurm.link.zmtp_frames import COMMAND, MORE, encode_frame
from launchers.subscriber import ProtocolError, metadata

KEY_BYTES, MAC_BYTES = 32, 16
_SIGMA = struct.unpack("<4I", b"expand 32-byte k")
_COLUMNS = ((0, 4, 8, 12), (5, 9, 13, 1), (10, 14, 2, 6), (15, 3, 7, 11))
_ROWS = ((0, 1, 2, 3), (5, 6, 7, 4), (10, 11, 8, 9), (15, 12, 13, 14))
_Z85 = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"
# MESSAGE: its name, the nonce's last eight bytes, the box: MAC, flags, payload.
_MESSAGE = b"\x07MESSAGE"
_OVERHEAD = len(_MESSAGE) + 8 + MAC_BYTES + 1
_ZEROS = bytes(KEY_BYTES + 16)
# Flags inside the box.
_MORE_INSIDE, _COMMAND_INSIDE = 1, 2


def decode_z85(text: str) -> bytes:
    """A key as connection files hold it (ZeroMQ RFC 32); raises ValueError for anything else."""
    if len(text) % 5:
        raise ValueError("Z85 comes in groups of five characters")
    decoded = bytearray()
    for start in range(0, len(text), 5):
        value = 0
        for character in text[start : start + 5]:
            value = value * 85 + _Z85.index(character)
        if value >> 32:
            raise ValueError("a group of Z85 that is too large")
        decoded += value.to_bytes(4, "big")
    return bytes(decoded)


def hsalsa20(key: bytes, nonce: bytes) -> bytes:
    """A key of ``key`` (32 bytes) and the first 16 bytes of a nonce (Bernstein, *Extending the Salsa20 nonce*)."""
    k, n = struct.unpack("<8I", key), struct.unpack("<4I", nonce)
    x = [_SIGMA[0], *k[:4], _SIGMA[1], *n, _SIGMA[2], *k[4:], _SIGMA[3]]
    for _double_round in range(10):
        for a, b, c, d in _COLUMNS + _ROWS:
            x[b] ^= _rotated(x[a] + x[d], 7)
            x[c] ^= _rotated(x[b] + x[a], 9)
            x[d] ^= _rotated(x[c] + x[b], 13)
            x[a] ^= _rotated(x[d] + x[c], 18)
    return struct.pack("<8I", *(x[number] for number in (0, 5, 10, 15, 6, 7, 8, 9)))


def _rotated(word: int, count: int) -> int:
    word &= 0xFFFFFFFF
    return (word << count | word >> (32 - count)) & 0xFFFFFFFF


class Box:
    """Boxes between two keys whose nonces begin with ``prefix`` (16 bytes); ``nonce`` is the other eight."""

    def __init__(self, secret: Any, public: bytes, prefix: bytes) -> None:
        shared = key_agreement(static_priv=secret, static_pub=import_x25519_public_key(public), kdf=lambda key: key)
        self._key = hsalsa20(hsalsa20(shared, bytes(16)), prefix)

    def _stream(self, nonce: bytes) -> tuple[Any, bytes]:
        """The cipher behind its first 32 bytes of key stream, which are Poly1305's key for this nonce."""
        cipher = Salsa20.new(self._key, nonce)
        return cipher, cipher.encrypt(bytes(KEY_BYTES))

    def seal(self, nonce: bytes, plain: bytes) -> bytes:
        cipher, key = self._stream(nonce)
        text = cipher.encrypt(plain)
        return bytes(Poly1305_MAC(key[:16], key[16:], text).digest() + text)

    def open(self, nonce: bytes, box: bytes) -> bytes:
        """Raises ProtocolError for a box that the other end did not make."""
        cipher, key = self._stream(nonce)
        try:
            Poly1305_MAC(key[:16], key[16:], box[MAC_BYTES:]).verify(box[:MAC_BYTES])
        except ValueError as error:
            raise ProtocolError("a box that the kernel's key does not open") from error
        return bytes(cipher.decrypt(box[MAC_BYTES:]))

    def beginning(self, nonce: bytes, box: bytes) -> bytes:
        """The first 16 bytes, of a box that nothing proves yet."""
        text = box[MAC_BYTES : MAC_BYTES + 16]
        # One call of the cipher: small messages cost little else. Behind Poly1305's key comes what hides the text.
        stream = Salsa20.new(self._key, nonce).encrypt(_ZEROS)[KEY_BYTES : KEY_BYTES + len(text)]
        plain = int.from_bytes(stream, "big") ^ int.from_bytes(text, "big")
        return plain.to_bytes(len(text), "big")


class Curve:
    """The mechanism CURVE; see ``subscriber.Mechanism``."""

    name = b"CURVE"

    def __init__(self, server_key: bytes) -> None:
        self.ready = False
        self._server_key = server_key
        self._long, self._short = (ECC.generate(curve="Curve25519") for _ in range(2))
        self._sent = 0
        self._received = 0
        self._hello = self._box(server_key, b"CurveZMQHELLO---")
        self._up: Box | None = None
        self._down: Box | None = None

    def _box(self, public: bytes, prefix: bytes) -> Box:
        return Box(self._short, public, prefix)

    def _next(self) -> bytes:
        self._sent += 1
        return self._sent.to_bytes(8, "big")

    def begin(self) -> bytes:
        nonce = self._next()
        # Version 1.0, and padding, so that HELLO is no smaller than its answer.
        hello = b"\x05HELLO\x01\x00" + bytes(72) + _public(self._short) + nonce + self._hello.seal(nonce, bytes(64))
        return encode_frame(COMMAND, hello)

    def take(self, command: bytes) -> bytes:
        if self._up is None:
            return self._take_welcome(command)
        self._take_ready(command)
        return b""

    def _take_welcome(self, command: bytes) -> bytes:
        if not command.startswith(b"\x07WELCOME") or len(command) != 168:
            raise ProtocolError(f"{command[:20]!r} in place of WELCOME")
        nonce, box = command[8:24], command[24:]
        plain = self._box(self._server_key, b"WELCOME-" + nonce[:8]).open(nonce[8:], box)
        server_short, cookie = plain[:KEY_BYTES], plain[KEY_BYTES:]
        self._up = self._box(server_short, b"CurveZMQMESSAGEC")
        self._down = self._box(server_short, b"CurveZMQMESSAGES")
        self._ready_box = self._box(server_short, b"CurveZMQREADY---")
        initiate = self._box(server_short, b"CurveZMQINITIATE")
        proof = _public(self._long) + self._vouch(server_short) + metadata()
        nonce = self._next()
        return encode_frame(COMMAND, b"\x08INITIATE" + cookie + nonce + initiate.seal(nonce, proof))

    def _vouch(self, server_short: bytes) -> bytes:
        """By the long-term key: that the short-term key is ours, for this server."""
        nonce = os.urandom(16)
        box = Box(self._long, server_short, b"VOUCH---" + nonce[:8])
        return nonce + box.seal(nonce[8:], _public(self._short) + self._server_key)

    def _take_ready(self, command: bytes) -> None:
        if not command.startswith(b"\x05READY"):
            raise ProtocolError(f"{command[:20]!r} in place of READY")
        self._ready_box.open(command[6:14], command[14:])
        self.ready = True

    def outgoing(self, flags: int, body: bytes) -> bytes:
        assert self._up is not None
        nonce = self._next()
        inside = bytes([_COMMAND_INSIDE if flags & COMMAND else 0])
        return encode_frame(0, _MESSAGE + nonce + self._up.seal(nonce, inside + body))

    def look(self, flags: int, beginning: bytes) -> tuple[int, bytes]:
        nonce, box = _parts(beginning)
        count = int.from_bytes(nonce, "big")
        if count <= self._received:
            raise ProtocolError("a nonce that was used before")
        self._received = count
        assert self._down is not None
        plain = self._down.beginning(nonce, box)
        inside = plain[0]
        return (MORE if inside & _MORE_INSIDE else 0) | (COMMAND if inside & _COMMAND_INSIDE else 0), plain[1:]

    def said(self, size: int) -> int:
        return size - _OVERHEAD

    def open(self, body: bytes) -> bytes:
        assert self._down is not None
        return self._down.open(*_parts(body))[1:]


def _public(key: Any) -> bytes:
    return bytes(key.public_key().export_key(format="raw"))


def _parts(body: bytes) -> tuple[bytes, bytes]:
    """Nonce and box of a MESSAGE."""
    if not body.startswith(_MESSAGE) or len(body) < _OVERHEAD:
        raise ProtocolError("a frame that is no MESSAGE")
    return body[8:16], body[16:]
