"""What the response socket wants of whoever owns a launcher."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from gateway_slurm.link.server import Link


class LinkHandler(Protocol):
    """Who owns a launcher on the server's side; all methods are called on the service's loop."""

    def link_up(self, link: Link, hello: dict[str, Any]) -> dict[str, Any]:
        """A launcher is authenticated; return the WELCOME's fields (without the token).

        The handler may set ``link.outbox`` to one of its own, which outlives the link.
        """

    def link_message(self, link: Link, name: str, payload: Any) -> None:
        """A message other than HEARTBEAT arrived."""

    def link_down(self, link: Link, reason: str) -> None:
        """The link is gone; it may be replaced by a new one."""

    def forgotten(self) -> None:
        """The launcher is let in no more."""

    def complained(self, reason: str) -> None:
        """The launcher could not even say HELLO."""

    def link_writable(self, link: Link) -> None:
        """The link took data: tunnel streams may be read on."""
