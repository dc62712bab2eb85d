"""One request to slurmrestd and its answer: bounded in size and time, and over HTTPS checked.

Only the transport: what an answer means is ``answers``'s to say. Redirects are not followed, since the token would
go along, and no proxy of the environment's is used.
"""

from __future__ import annotations

import asyncio
import json
import re
import ssl
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from tornado.httpclient import HTTPRequest, HTTPResponse
from tornado.httputil import HTTPHeaders
from tornado.simple_httpclient import HTTPStreamClosedError, HTTPTimeoutError, SimpleAsyncHTTPClient

from gateway_slurm.errors import ConfigError, SlurmUnavailable
from gateway_slurm.slurm.commands import means_unavailable
from gateway_slurm.slurm.rest.responses import (
    NOT_AUTHENTICATED_ERROR,
    NOT_PERMITTED_ERROR,
    UNSPECIFIED_ERROR,
    ZERO_BYTES_ERROR,
    ReportedError,
    reported_errors,
)
from gateway_slurm.slurm.url import ClusterUrl

MAX_ANSWER: Final = 64 << 20
"""Bytes of one answer: a list of all jobs has 2 to 6 KB a job."""
MAX_CLIENTS: Final = 8
"""Requests to slurmrestd at once; more wait for their turn."""
CONNECT_SECONDS: Final = 10.0
_IN_THREAD: Final = 256 << 10  # bytes: reading more JSON than this takes longer than the loop may stand still
_NOT_AUTHENTICATED_STATUSES: Final = (401, 511)  # RFC 9110, RFC 6585
_SHOWN: Final = 300
_HIDDEN: Final = "(the token)"


@dataclass(frozen=True)
class RestResponse:
    """What came back: ``document`` is the JSON object, empty where the body is none; ``excerpt`` shows the body."""

    status: int
    document: Mapping[str, Any] = field(default_factory=dict, repr=False)
    errors: tuple[ReportedError, ...] = ()
    excerpt: str = ""
    content_type: str = ""

    @property
    def is_good(self) -> bool:
        """Whether the request was done, and the answer is one of slurmrestd's."""
        return 200 <= self.status < 300 and bool(self.document) and not self.errors

    @property
    def refuses_token(self) -> bool:
        """Whether the token was not taken."""
        return self.status in _NOT_AUTHENTICATED_STATUSES or any(
            one.number == NOT_AUTHENTICATED_ERROR for one in self.errors
        )

    @property
    def may_refuse_token(self) -> bool:
        """The same for 22.05, which has only words that can also mean that the controller is down.

        Of a job to cancel, 24.11 and later have no other words for a controller that is down.
        """
        vague = self.status >= 500 and any(one.number in (UNSPECIFIED_ERROR, ZERO_BYTES_ERROR) for one in self.errors)
        vague |= any(one.number == NOT_PERMITTED_ERROR for one in self.errors)
        return self.refuses_token or vague

    @property
    def is_refusal(self) -> bool:
        """Whether Slurm was asked, and said no: not a controller that is down, nor a token that is not taken."""
        unasked = self.may_refuse_token or any(means_unavailable(one.words) for one in self.errors)
        return bool(self.errors) and not unasked


class RestClient:
    """Asks one slurmrestd. To be used on one loop; whoever made it calls ``close`` there.

    ``timeout`` is in seconds, for one request with its answer. ``counts`` says how often each was asked.
    """

    def __init__(
        self,
        url: ClusterUrl,
        *,
        ca_file: str = "",
        timeout: float = 60,
        max_answer: int = MAX_ANSWER,
        counts: Counter[str] | None = None,
    ) -> None:
        self.url = url
        self.counts: Counter[str] = Counter() if counts is None else counts
        self._ca_file, self._timeout, self._max_answer = ca_file, timeout, max_answer
        self._client: SimpleAsyncHTTPClient | None = None
        self._tls: ssl.SSLContext | None = None

    def __str__(self) -> str:
        return f"slurmrestd at {self.url.base}"

    def close(self) -> None:
        """End what is under way."""
        if self._client is not None:
            self._client.close()
            self._client = None

    async def ask(self, method: str, path: str, *, user: str, token: str, body: bytes | None = None) -> RestResponse:
        """Send one request as ``user`` and return the answer, whatever its status.

        Raises SlurmUnavailable when none came, or none that is whole; whether a request was carried out is not
        known then. Raises ConfigError for a CA file that cannot be used.
        """
        client = await self._open()
        seen: dict[str, str] = {}
        request = HTTPRequest(
            self.url.base + path,
            method=method,
            headers=_headers(user, token, body),
            body=body,
            connect_timeout=min(CONNECT_SECONDS, self._timeout),
            request_timeout=self._timeout,
            follow_redirects=False,
            decompress_response=False,
            header_callback=lambda line: _note_length(line, seen),
            ssl_options=self._tls,
        )
        self.counts[f"slurmrestd {method} {_kind(path)}"] += 1
        try:
            response = await client.fetch(request, raise_error=False)
        except Exception as error:  # OSError, ssl.SSLError, HTTPInputError and more: no answer
            raise self._unavailable(method, path, error, seen, token) from error
        if response.error is not None and response.code == 599:
            raise self._unavailable(method, path, response.error, seen, token) from response.error
        return await self._read(response, token)

    async def _open(self) -> SimpleAsyncHTTPClient:
        if self._client is None:
            if self.url.tls:
                self._tls = await asyncio.to_thread(_context, self._ca_file)
            self._client = SimpleAsyncHTTPClient(
                force_instance=True, max_clients=MAX_CLIENTS, max_body_size=self._max_answer
            )
        return self._client

    async def _read(self, response: HTTPResponse, token: str) -> RestResponse:
        raw = response.body or b""
        kind = str(response.headers.get("Content-Type", "")).partition(";")[0].strip().lower()
        document: Mapping[str, Any] = {}
        if kind == "application/json":
            document = _parse(raw, token) if len(raw) < _IN_THREAD else await asyncio.to_thread(_parse, raw, token)
        found = tuple(reported_errors(document))
        return RestResponse(response.code, document, found, "" if found else _excerpt(raw, token), kind)

    def _unavailable(
        self, method: str, path: str, error: BaseException, seen: Mapping[str, str], token: str
    ) -> SlurmUnavailable:
        announced = int(seen.get("content-length", "0"))
        if announced > self._max_answer:
            what = f"its answer has {announced} bytes, and at most {self._max_answer} are read"
        elif isinstance(error, HTTPTimeoutError):
            what = f"it did not answer within {self._timeout:g} s"
        elif isinstance(error, HTTPStreamClosedError):
            what = (
                "the connection ended before the answer was whole" if seen else "the connection ended without an answer"
            ) + f", or it is of more than {self._max_answer} bytes"
        elif isinstance(error, ssl.SSLCertVerificationError):
            what = f"its certificate is not valid ({error.verify_message}); see SlurmService.rest_ca_file"
        else:
            what = str(error).replace(token, _HIDDEN) or type(error).__name__
        return SlurmUnavailable(
            f"{self} could not be asked ({method} {_kind(path)}): {what}. Nothing is known about the jobs",
            argv=["slurmrestd"],
        )


def _headers(user: str, token: str, body: bytes | None) -> HTTPHeaders:
    headers = HTTPHeaders(
        {
            "Accept": "application/json",
            "User-Agent": "gateway_slurm",
            "X-SLURM-USER-NAME": user,
            "X-SLURM-USER-TOKEN": token,
        }
    )
    if body is not None:
        headers["Content-Type"] = "application/json"
    return headers


def _note_length(line: str, seen: dict[str, str]) -> None:
    """Remember what the headers announce, also of a body that is not read then."""
    name, _colon, value = line.partition(":")
    if name.strip().lower() == "content-length" and re.fullmatch(r"[0-9]{1,15}", value.strip(), re.ASCII):
        seen["content-length"] = value.strip()
    seen.setdefault("answered", "yes")


def _context(ca_file: str) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file or None)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"SlurmService.rest_ca_file: {ca_file} cannot be used: {error}") from error


# There are proxies whose error pages show the request with its headers.
def _parse(raw: bytes, token: str) -> Mapping[str, Any]:
    try:
        found = json.loads(raw.replace(token.encode(), _HIDDEN.encode()))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _excerpt(raw: bytes, token: str) -> str:
    """Show the beginning of what is no answer of slurmrestd's: a proxy's page, or half of something."""
    start = raw[: 4 * _SHOWN + len(token)].replace(token.encode(), _HIDDEN.encode())
    text = start[: 4 * _SHOWN].decode(errors="replace")
    text = re.sub(r"<[^>]*>", " ", text)
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())[:_SHOWN]


def _kind(path: str) -> str:
    """Name a request without its version and job: few names for counters and messages."""
    return re.sub(r"^/slurm/v[0-9.]+/|/[0-9]+$|^/", "", path)
