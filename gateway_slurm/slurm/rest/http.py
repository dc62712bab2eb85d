"""One HTTP request to slurmrestd and its response, with limits on size and time; HTTPS certificates are checked.

This is the transport; ``responses`` reads the contents. The client does not follow redirects, which would receive the
token, and does not use a proxy from the environment.
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
from tornado.simple_httpclient import HTTPStreamClosedError, HTTPTimeoutError, SimpleAsyncHTTPClient

from gateway_slurm._util import dial_advice
from gateway_slurm.errors import ConfigError, SlurmUnavailable
from gateway_slurm.slurm.commands import means_unavailable
from gateway_slurm.slurm.rest import responses
from gateway_slurm.slurm.url import ClusterUrl

MAX_RESPONSE: Final = 64 << 20
"""Bytes of one response; a list of all jobs has 2 to 6 KB per job."""
MAX_CLIENTS: Final = 8
"""The number of requests to slurmrestd at a time; further ones wait."""
CONNECT_TIMEOUT: Final = 10.0  # seconds
_MAX_ON_LOOP: Final = 256 << 10  # bytes; parsing more JSON than this would block the loop for too long
_NOT_AUTHENTICATED_STATUSES: Final = (401, 511)  # RFC 9110, RFC 6585
_MAX_EXCERPT: Final = 300  # characters
_REDACTED: Final = "(the token)"


@dataclass(frozen=True)
class RestResponse:
    """``document`` is the body's JSON object, empty if the body is not one; ``excerpt`` then shows the body."""

    status: int
    document: Mapping[str, Any] = field(default_factory=dict, repr=False)
    errors: tuple[responses.ReportedError, ...] = ()
    excerpt: str = ""
    content_type: str = ""

    @property
    def is_success(self) -> bool:
        """Whether slurmrestd carried the request out."""
        return 200 <= self.status < 300 and bool(self.document) and not self.errors

    def reports(self, *numbers: int) -> bool:
        return any(error.number in numbers for error in self.errors)

    @property
    def refuses_token(self) -> bool:
        return self.status in _NOT_AUTHENTICATED_STATUSES or self.reports(responses.NOT_AUTHENTICATED_ERROR)

    @property
    def may_refuse_token(self) -> bool:
        """Whether the server refused the token or the controller is down; some errors mean either.

        22.05 reports a refused token in this way, and 24.11 and later a cancellation while the controller is down.
        """
        ambiguous = self.status >= 500 and self.reports(responses.UNSPECIFIED_ERROR, responses.ZERO_BYTES_ERROR)
        return self.refuses_token or ambiguous or self.reports(responses.NOT_PERMITTED_ERROR)

    @property
    def is_refusal(self) -> bool:
        """Whether Slurm refused the request: neither is the controller down nor was the token refused."""
        not_decided = self.may_refuse_token or any(means_unavailable(error.text) for error in self.errors)
        return bool(self.errors) and not not_decided


class RestClient:
    """An HTTP client for one slurmrestd. Its owner uses it on one loop and calls ``close`` there.

    ``timeout`` is in seconds, for one request and its response. ``counts`` is how often each kind of request was sent.
    """

    def __init__(
        self,
        url: ClusterUrl,
        *,
        ca_file: str = "",
        timeout: float = 60,
        max_response: int = MAX_RESPONSE,
        counts: Counter[str] | None = None,
    ) -> None:
        self.url = url
        self.counts: Counter[str] = Counter() if counts is None else counts
        self._ca_file, self._timeout, self._max_response = ca_file, timeout, max_response
        self._client: SimpleAsyncHTTPClient | None = None
        self._tls: ssl.SSLContext | None = None

    def __str__(self) -> str:
        return f"slurmrestd at {self.url.base}"

    def close(self) -> None:
        """End the requests that are under way."""
        if self._client is not None:
            self._client.close()
            self._client = None

    async def request(
        self, method: str, path: str, *, user: str, token: str, body: bytes | None = None
    ) -> RestResponse:
        """Send one request as ``user`` and return the response, for any status.

        Raises SlurmUnavailable without a complete response; the server may have carried the request out nevertheless.
        Raises ConfigError for a CA file that cannot be used.
        """
        client = await self._open()
        headers: dict[str, str] = {}
        content_type = {} if body is None else {"Content-Type": "application/json"}
        request = HTTPRequest(
            self.url.base + path,
            method=method,
            headers={
                "Accept": "application/json",
                "User-Agent": "gateway_slurm",
                "X-SLURM-USER-NAME": user,
                "X-SLURM-USER-TOKEN": token,
                **content_type,
            },
            body=body,
            connect_timeout=min(CONNECT_TIMEOUT, self._timeout),
            request_timeout=self._timeout,
            follow_redirects=False,
            decompress_response=False,
            header_callback=lambda line: _note_length(line, headers),
            ssl_options=self._tls,
        )
        self.counts[f"slurmrestd {method} {_request_name(path)}"] += 1
        try:
            response = await client.fetch(request, raise_error=False)
        except Exception as error:  # OSError, ssl.SSLError, HTTPInputError and more: no response
            raise self._unavailable(method, path, error, headers, token) from error
        if response.error is not None and response.code == 599:
            raise self._unavailable(method, path, response.error, headers, token) from response.error
        return await self._read(response, token)

    async def _open(self) -> SimpleAsyncHTTPClient:
        if self._client is None:
            if self.url.tls:
                self._tls = await asyncio.to_thread(_tls_context, self._ca_file)
            self._client = SimpleAsyncHTTPClient(
                force_instance=True, max_clients=MAX_CLIENTS, max_body_size=self._max_response
            )
        return self._client

    async def _read(self, response: HTTPResponse, token: str) -> RestResponse:
        raw = response.body or b""
        content_type = str(response.headers.get("Content-Type", "")).partition(";")[0].strip().lower()
        document: Mapping[str, Any] = {}
        if content_type == "application/json":
            document = _parse(raw, token) if len(raw) < _MAX_ON_LOOP else await asyncio.to_thread(_parse, raw, token)
        errors = tuple(responses.reported_errors(document))
        return RestResponse(response.code, document, errors, "" if errors else _excerpt(raw, token), content_type)

    def _unavailable(
        self, method: str, path: str, error: BaseException, headers: Mapping[str, str], token: str
    ) -> SlurmUnavailable:
        length = int(headers.get("content-length", "0"))
        if length > self._max_response:
            reason = f"its response has {length} bytes, and at most {self._max_response} are read"
        elif isinstance(error, HTTPTimeoutError) and "request" in str(error):
            reason = f"it did not answer within {self._timeout:g} s"
        elif isinstance(error, HTTPStreamClosedError):
            progress = "before the response was complete" if headers else "without a response"
            reason = f"the connection ended {progress}, or the response has more than {self._max_response} bytes"
        elif isinstance(error, ssl.SSLCertVerificationError):
            reason = f"its certificate is not valid ({error.verify_message}); see SlurmService.rest_ca_file"
        else:
            reason = self._with_advice(str(error).replace(token, _REDACTED) or type(error).__name__)
        return SlurmUnavailable(
            f"{self} gave no response ({method} {_request_name(path)}): {reason}. Nothing is known about the jobs",
            argv=["slurmrestd"],
        )

    def _with_advice(self, reason: str) -> str:
        advice = dial_advice(reason, f"TCP port {self.url.port} of {self.url.host}", "this machine")
        return f"{reason} ({advice})" if advice else reason


def _note_length(line: str, headers: dict[str, str]) -> None:
    """Keep the announced length, and that there was a header at all, for the message about a body that is not read."""
    name, _colon, value = line.partition(":")
    if name.strip().lower() == "content-length" and re.fullmatch(r"[0-9]{1,15}", value.strip(), re.ASCII):
        headers["content-length"] = value.strip()
    headers.setdefault("any", "yes")


def _tls_context(ca_file: str) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file or None)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"SlurmService.rest_ca_file: {ca_file} cannot be used: {error}") from error


# Both functions remove the token: some proxies' error pages show the request with its headers.
def _parse(raw: bytes, token: str) -> Mapping[str, Any]:
    try:
        document = json.loads(raw.replace(token.encode(), _REDACTED.encode()))
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _excerpt(raw: bytes, token: str) -> str:
    """Return the beginning of a body that is not slurmrestd's, such as a proxy's page or a partial response."""
    start = raw[: 4 * _MAX_EXCERPT + len(token)].replace(token.encode(), _REDACTED.encode())
    text = start[: 4 * _MAX_EXCERPT].decode(errors="replace")
    text = re.sub(r"<[^>]*>", " ", text)
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())[:_MAX_EXCERPT]


def _request_name(path: str) -> str:
    """Return the path without version and job id, so that counters and messages have few names."""
    return re.sub(r"^/slurm/v[0-9.]+/|/[0-9]+$|^/", "", path)
