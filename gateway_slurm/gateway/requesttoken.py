"""Where a request carries its token: in the Authorization header, and only by exception in its URL.

URLs end up in logs, histories and Referer headers, so a token in one is taken out of the request before
anything else sees it, whether it is accepted or refused.
"""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import unquote_plus

from tornado.httputil import HTTPServerRequest

_AUTHORIZATION: Final = re.compile(r"\s*(?:token|bearer)\s+([!-~]{1,4096})\s*", re.IGNORECASE | re.ASCII)
_REPLACED: Final = "token=[secret]"


def request_token(request: HTTPServerRequest) -> str | None:
    """The token of ``Authorization: token …`` or ``Bearer …``; None for any other scheme or none."""
    match = _AUTHORIZATION.fullmatch(request.headers.get("Authorization", ""))
    return match[1] if match else None


def take_url_token(request: HTTPServerRequest) -> str | None:
    """Remove ``token`` from the request's URL and arguments and return it; None if there is none."""
    parts = (request.query or "").split("&")
    found = [part for part in parts if unquote_plus(part.partition("=")[0]) == "token"]
    if not found:
        return None
    request.query = "&".join(_REPLACED if part in found else part for part in parts)
    request.uri = f"{request.path}?{request.query}"
    request.arguments.pop("token", None)
    request.query_arguments.pop("token", None)
    return unquote_plus(found[0].partition("=")[2])
