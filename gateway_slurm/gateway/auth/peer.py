"""Gateways of a deployment prove themselves to each other, with a key derived from the store's key.

A forwarded request names its user, and carries no credentials of the client: an address that is not a gateway's gets
none. The proof (HMAC-SHA256, RFC 2104) is of the user, the method, the path with its query, the body, the time and the
gateway that is asked. The answer has a proof as well, without which it is not believed.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from typing import Final
from weakref import WeakKeyDictionary

from tornado.httputil import HTTPServerRequest

from gateway_slurm.errors import IdentityUnavailable, NotAllowed
from gateway_slurm.gateway.auth.user import GatewayUser

USER: Final = "Gateway-Slurm-User"
PROOF: Final = "Gateway-Slurm-Proof"
ANSWER_PROOF: Final = "Gateway-Slurm-Answer-Proof"
MAX_AGE: Final = 120.0
"""Seconds by which the clocks of two gateways may differ, and for which a recorded request could be sent again."""
_FIELDS: Final = frozenset(field.name for field in fields(GatewayUser))


class PeerProof:
    """Signs requests to other gateways, and checks theirs.

    ``key`` returns the key, empty before the store is open; ``server_id`` this gateway's id.
    """

    def __init__(self, key: Callable[[], bytes], server_id: Callable[[], str]) -> None:
        self._key, self._server_id = key, server_id
        # A websocket is asked for its user again long after its request.
        self._known: WeakKeyDictionary[HTTPServerRequest, GatewayUser] = WeakKeyDictionary()

    def sign(self, target: str, method: str, uri: str, user: GatewayUser, body: bytes | None) -> dict[str, str]:
        """The headers of a request to the gateway with the id ``target``. Raises IdentityUnavailable without a key."""
        name = base64.urlsafe_b64encode(json.dumps(asdict(user)).encode()).decode()
        begin = f"{time.time():.0f}.{secrets.token_hex(16)}.{_digest(body or b'')}"
        return {USER: name, PROOF: f"{begin}.{self._mac('request', begin, target, method, uri, name)}"}

    async def authenticate(self, request: HTTPServerRequest) -> GatewayUser | None:
        """The user whom another gateway names; None for a request without a proof.

        Raises NotAllowed for a proof that is not valid, and IdentityUnavailable before the store is open.
        """
        if PROOF not in request.headers:
            return None
        if request in self._known:
            return self._known[request]
        name = request.headers.get(USER, "")
        begin, _dot, mac = request.headers[PROOF].rpartition(".")
        expected = self._mac("request", begin, self._server_id(), request.method or "", request.uri or "", name)
        if not hmac.compare_digest(mac.encode(errors="replace"), expected.encode()):
            raise NotAllowed("the request is not from a gateway of this deployment, or is for another one", field=PROOF)
        sent, _nonce, digest = begin.split(".")
        if abs(time.time() - float(sent)) > MAX_AGE:
            raise NotAllowed("the request is too old, or the clocks of two gateways differ too much", field=PROOF)
        if request.body and digest != _digest(request.body):
            raise NotAllowed("the body is not the one that a gateway has sent", field=PROOF)
        values = json.loads(base64.urlsafe_b64decode(name))
        user = GatewayUser(**{key: value for key, value in values.items() if key in _FIELDS})
        self._known[request] = user
        return user

    def answer_to(self, request: HTTPServerRequest) -> str:
        """The proof in the answer to a request; empty for a request that no gateway has signed."""
        return self._answer_mac(request.headers[PROOF]) if request in self._known else ""

    def is_answer(self, sent: Mapping[str, str], received: Mapping[str, str]) -> bool:
        """Whether a gateway with the key has answered the request with the headers ``sent``."""
        expected = self._answer_mac(sent[PROOF])
        return hmac.compare_digest(received.get(ANSWER_PROOF, "").encode(errors="replace"), expected.encode())

    def _answer_mac(self, proof: str) -> str:
        return self._mac("answer", proof)

    def _mac(self, *parts: str) -> str:
        key = self._key()
        if not key:
            raise IdentityUnavailable("the store is not open yet, with whose key gateways prove themselves: try again")
        return hmac.new(key, json.dumps(parts).encode(), hashlib.sha256).hexdigest()


def _digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()
