"""What the application makes, so that the gateways of a deployment know of each other."""

from __future__ import annotations

import socket
from typing import Any

from gateway_slurm.gateway.passing import Passing
from gateway_slurm.gateway.peerclient import PeerClient
from gateway_slurm.gateway.peers import Peers
from gateway_slurm.gateway.storedirectory import StoreDirectory
from gateway_slurm.service import SlurmService

_ALL_ADDRESSES = ("", "*", "0.0.0.0", "::")  # noqa: S104 - compared with, not listened on


def default_peer_url(app: Any) -> str:
    """Where this process listens, as far as its own settings say."""
    if app.sock:
        return ""
    host = socket.getfqdn() if app.ip in _ALL_ADDRESSES else app.ip
    host = "127.0.0.1" if host == "localhost" else host
    host = f"[{host}]" if ":" in host else host
    return f"{'https' if app.certfile else 'http'}://{host}:{app.port}{app.base_url}"


def make_passing(app: Any) -> Passing:
    """What the handlers find in their settings as ``passing``; the application closes it."""
    directory = StoreDirectory(SlurmService.instance())
    proof = tuple(filter(None, [getattr(app.identity_provider, "trusted_header", "")]))
    passing = Passing(Peers(directory, log=app.log), PeerClient(app.peer_cafile), proof=proof)
    app.web_app.settings["passing"] = passing
    return passing
