"""A slurmrestd that is slow, broken, too large or another service; and HTTPS."""

from __future__ import annotations

import asyncio
import json
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from gateway_slurm.errors import ConfigError, SlurmError, SlurmUnavailable, SubmitRefused
from gateway_slurm.slurm.model import JobSpec
from gateway_slurm.slurm.rest.driver import RestDriver, Slurmrestd
from gateway_slurm.slurm.rest.http import RestClient
from gateway_slurm.slurm.url import parse_cluster_url

SECRET = "a.secret.token"  # noqa: S105 - to be looked for in messages
OPENAPI = {"paths": {"/slurm/v0.0.42/job/submit": {}}}
NO_PARTITION = {"errors": [{"error_number": 2000, "error": "Invalid partition name specified"}]}
NOT_YOURS = {"errors": [{"error_number": 2002, "error": "Access/permission denied", "description": "Signal failed"}]}
# From 24.05 on the response has an entry for each job.
NOT_YOURS_EITHER = {"errors": [], "status": [{"error": {"code": 2002, "string": "Access/permission denied"}}]}
GONE = {"errors": [], "status": [{"error": {"code": 2017, "string": "Invalid job id specified"}}]}
DONE = {"errors": [], "status": [{"error": {"code": 0, "string": "No error"}}]}
NO_CONTROLLER = {"errors": [{"error_number": 1, "error": "Operation not permitted", "source": "slurm_kill_jobs()"}]}
NO_TOKEN = {"errors": [{"error_number": 1007, "error": "Protocol authentication error"}]}
UNKNOWN = {"errors": [{"error_number": 2017, "error": "Invalid job id specified"}]}
VAGUE = {"errors": [{"error_number": -1, "error": "Unspecified error"}], "jobs": []}
HALF = {"errors": [{"error_number": 1802, "error": "Unable to contact slurm controller (receive failure)"}]}
DOWN = {"errors": [{"error_number": 1800, "error": "Unable to contact slurm controller (connect failure)"}]}

Respond = Callable[[str, asyncio.StreamWriter], Awaitable[None]]


class FewTokens:
    """Tokens from a list: each refusal gives the next one, until the list ends."""

    def __init__(self, *tokens: str) -> None:
        self.left = list(tokens)

    async def token(self, user: str, *, refused: str = "") -> str:
        if refused == self.left[0] and len(self.left) > 1:
            self.left.pop(0)
        return self.left[0]


class Server:
    """A server; ``answers`` maps the beginning of a request line to (status, document) or a function."""

    def __init__(self, answers: Mapping[str, object]) -> None:
        self.answers = {"GET /openapi/v3": (200, OPENAPI), **answers}
        self.heard: list[str] = []
        self.port = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request on one connection."""
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.heard.append(head)
            found = next(answer for start, answer in self.answers.items() if head.startswith(start))
            if isinstance(found, tuple):
                status, document = found
                writer.write(response(status, json.dumps(document).encode()))
            elif isinstance(found, bytes):
                writer.write(found)
            else:
                await found(head, writer)  # type: ignore[operator]
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            return
        finally:
            writer.close()

    def asked(self, start: str) -> int:
        """How often a request line began so."""
        return sum(head.startswith(start) for head in self.heard)


def response(status: int, body: bytes, kind: str = "application/json", length: int | None = None) -> bytes:
    """An HTTP/1.1 response that announces ``length`` bytes."""
    head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(body) if length is None else length}"
    return head.encode() + b"\r\nConnection: close\r\n\r\n" + body


@asynccontextmanager
async def asking(
    answers: Mapping[str, object], *, tokens: FewTokens | None = None, timeout: float = 20, max_response: int = 10_000
) -> AsyncIterator[tuple[RestDriver, Server]]:
    """A driver and its server."""
    server = Server(answers)
    listener = await asyncio.start_server(server.handle, "127.0.0.1", 0)
    server.port = listener.sockets[0].getsockname()[1]
    url = parse_cluster_url(f"rest+http://127.0.0.1:{server.port}")
    rest = Slurmrestd(RestClient(url, timeout=timeout, max_response=max_response), tokens or FewTokens(SECRET))
    try:
        yield RestDriver(rest, "ann", find_launcher=lambda _jobid: None), server
    finally:
        rest.client.close()
        listener.close()


async def error_of(asked: Awaitable[object]) -> SlurmError:
    """The error of an awaited call; it never holds the token."""
    with pytest.raises(SlurmError) as caught:
        await asked
    assert SECRET not in str(caught.value)
    return caught.value


async def silence(_head: str, writer: asyncio.StreamWriter) -> None:
    """Give no answer until the other side closes."""
    await writer.wait_closed()


async def drip(_head: str, writer: asyncio.StreamWriter) -> None:
    """Answer without end, one byte at a time."""
    writer.write(response(200, b"", length=5000))
    while not writer.is_closing():
        writer.write(b" ")
        await writer.drain()
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("answer", [silence, drip])
async def test_a_slow_answer_is_given_up(answer: Respond) -> None:
    """The timeout is for the complete response."""
    async with asking({"GET /slurm": answer}, timeout=0.5) as (driver, _server):
        error = await error_of(driver.jobs(["1"]))
    assert isinstance(error, SlurmUnavailable)
    assert "within 0.5 s" in str(error)


CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (response(200, b'{"jobs": [', length=500), "ended before the response was complete"),
        (response(200, b" " * 20_000), "has 20000 bytes, and at most 10000 are read"),
        (CHUNKED + b"4000\r\n" + b" " * 0x4000 + b"\r\n0\r\n\r\n", "more than 10000 bytes"),
        (b"", "without a response"),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "gave no response"),
        (response(200, b'{"jobs": ['), "not slurmrestd's JSON"),
        (response(200, b"[]"), "not slurmrestd's JSON"),
        (response(200, b"[" * 9000), "not slurmrestd's JSON"),
        (response(200, b"<h1>Log in, please</h1>", "text/html"), "Log in, please"),
        (response(502, b"<title>Bad\x1b[31m Gateway</title>", "text/html"), "answered 502: Bad [31m Gateway"),
        (response(503, b""), "answered 503: nothing"),
        (response(403, b"no", "text/plain"), "ann is not allowed to do this"),
        (response(200, json.dumps({"jobs": []}).encode()), "answered 200"),
        (response(200, json.dumps({"errors": []}).encode()), "no list of jobs"),
    ],
)
async def test_an_unusable_response(answer: bytes, words: str) -> None:
    """An incomplete, too large or foreign response is an error that shows it; nothing is known about the job."""
    async with asking({"GET /slurm": answer}) as (driver, _server):
        error = await error_of(driver.jobs(["1"]))
    assert isinstance(error, SlurmUnavailable)
    assert words in str(error)
    assert "\x1b" not in str(error)


@pytest.mark.parametrize("kind", ["application/json", "text/html"])
async def test_a_token_that_comes_back_is_not_shown(kind: str) -> None:
    """Some proxies' error pages show the request."""

    async def mirror(head: str, writer: asyncio.StreamWriter) -> None:
        shown = json.dumps({"errors": [{"error": head}]}) if kind == "application/json" else f"<pre>{'x' * 1100}{head}"
        writer.write(response(500, shown.encode(), kind))

    async with asking({"GET /slurm": mirror}) as (driver, _server):
        error = await error_of(driver.jobs(["1"]))
    assert SECRET[:8] not in str(error)
    assert "answered 500" in str(error)


async def test_no_server_on_the_port() -> None:
    """No process listens on the port."""
    async with asking({}) as (driver, server):
        driver.rest.client.url = parse_cluster_url("rest+http://127.0.0.1:1")
        error = await error_of(driver.jobs(["1"]))
        assert isinstance(error, SlurmUnavailable)
        assert "gave no response" in str(error)
        assert server.heard == []


async def test_redirects_are_not_followed() -> None:
    """A token is sent to the configured server only."""
    async with asking({}) as (_other, elsewhere):
        where = f"http://127.0.0.1:{elsewhere.port}/".encode()
        moved = response(302, b"").replace(b"\r\nConnection", b"\r\nLocation: " + where + b"\r\nConnection")
        async with asking({"GET /slurm": moved}) as (driver, _server):
            error = await error_of(driver.jobs(["1"]))
        assert "answered 302" in str(error)
        assert elsewhere.heard == []


@pytest.mark.parametrize("refusal", [(401, {}), (511, NO_TOKEN), (500, NO_TOKEN), (500, VAGUE)])
async def test_a_refused_token_is_replaced_once(refusal: object) -> None:
    """The request is repeated with another token; without one the error names the settings."""
    good = response(200, json.dumps({"jobs": [{"job_id": 1, "job_state": ["RUNNING"]}]}).encode())

    async def by_token(head: str, writer: asyncio.StreamWriter) -> None:
        status, document = refusal  # type: ignore[misc]
        writer.write(good if "X-Slurm-User-Token: new" in head else response(status, json.dumps(document).encode()))

    async with asking({"GET /slurm": by_token}, tokens=FewTokens("old", "new")) as (driver, server):
        assert set(await driver.jobs(["1"])) == {"1"}
        assert server.asked("GET /slurm") == 2
    async with asking({"GET /slurm": by_token}, tokens=FewTokens("old")) as (driver, server):
        assert "token" in str(await error_of(driver.jobs(["1"])))
        assert server.asked("GET /slurm") == 1


async def test_user_and_token_are_in_headers_only() -> None:
    """User and token are in headers; the path, which logs show, has neither."""
    async with asking({"GET /slurm": (404, UNKNOWN)}) as (driver, server):
        assert await driver.jobs(["1"]) == {}
    line, _end, headers = server.heard[-1].partition("\r\n")
    assert line == "GET /slurm/v0.0.42/job/1 HTTP/1.1"
    assert "X-Slurm-User-Name: ann" in headers
    assert f"X-Slurm-User-Token: {SECRET}" in headers


@pytest.mark.parametrize("status", [400, 422, 500])
async def test_a_job_that_is_refused(status: int) -> None:
    """With any status, a response with Slurm's words is a refusal and is not repeated."""
    async with asking({"POST /slurm": (status, NO_PARTITION)}) as (driver, server):
        error = await error_of(driver.submit(JobSpec(name="n", script="#!/bin/sh\n", comment="c", partition="nosuch")))
        assert server.asked("POST") == 1
    assert isinstance(error, SubmitRefused)
    assert str(error) == "Slurm refused the job (partition nosuch): Invalid partition name specified"


async def test_a_submission_that_cannot_have_reached_the_controller_is_an_error_at_once() -> None:
    """Each lookup of its job would take as long as slurmrestd waits for the controller."""
    async with asking({"POST /slurm": (500, DOWN)}) as (driver, server):
        error = await error_of(driver.submit(JobSpec(name="n", script="#!/bin/sh\n", comment="c")))
        assert server.asked("GET /slurm") == 0
    assert isinstance(error, SlurmUnavailable)
    assert not isinstance(error, SubmitRefused)


@pytest.mark.parametrize("answer", [(500, HALF), (500, VAGUE), response(502, b"<p>no", "text/html"), b""])
async def test_a_submission_that_is_not_answered_is_looked_for(answer: object) -> None:
    """If the job may exist, it is looked up by its comment, and no job is submitted twice."""
    theirs = [
        {"job_id": 7, "name": "n", "comment": "other", "user_name": "ann", "job_state": ["PENDING"]},
        {"job_id": 8, "name": "n", "comment": "mine", "user_name": "ann", "job_state": ["PENDING"]},
        {"job_id": 9, "name": "n", "comment": "mine", "user_name": "bob", "job_state": ["PENDING"]},
    ]
    spec = JobSpec(name="n", script="#!/bin/sh\n", comment="mine")
    for jobs, found in ((theirs, "8"), (theirs[:1], "")):
        async with asking({"POST /slurm": answer, "GET /slurm": (200, {"jobs": jobs})}) as (driver, server):
            if found:
                assert await driver.submit(spec) == found
            else:
                assert isinstance(await error_of(driver.submit(spec)), SlurmUnavailable)
            assert server.asked("POST") == 1


async def test_a_vague_failure_with_an_expired_token_is_submitted_again() -> None:
    """22.05 does not report a refused token. With a new token, a job that is not in Slurm's list is submitted again."""

    async def by_token(head: str, writer: asyncio.StreamWriter) -> None:
        fresh = "X-Slurm-User-Token: new" in head
        listed = {"jobs": []} if head.startswith("GET") else {"job_id": 5}
        writer.write(response(200, json.dumps(listed).encode()) if fresh else response(500, json.dumps(VAGUE).encode()))

    async with asking({"POST /slurm": by_token, "GET /slurm": by_token}, tokens=FewTokens("old", "new")) as (
        driver,
        server,
    ):
        assert await driver.submit(JobSpec(name="n", script="#!/bin/sh\n", comment="mine")) == "5"
        assert server.asked("POST") == 2


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ((200, {"errors": []}), None),
        ((200, DONE), None),
        ((200, GONE), None),
        ((500, UNKNOWN), None),
        ((403, NOT_YOURS), SlurmError),
        ((500, NOT_YOURS), SlurmError),
        ((200, NOT_YOURS_EITHER), SlurmError),
        ((403, NO_CONTROLLER), SlurmUnavailable),
        ((500, NO_CONTROLLER), SlurmUnavailable),
        ((500, DOWN), SlurmUnavailable),
        ((500, VAGUE), SlurmUnavailable),
        ((511, NO_TOKEN), SlurmUnavailable),
        (response(502, b"<p>no", "text/html"), SlurmUnavailable),
    ],
)
async def test_cancelling(answer: object, kind: type[SlurmError] | None) -> None:
    """A finished job is no error, and a refusal has Slurm's words; any other response tells nothing."""
    async with asking({"DELETE /slurm": answer}) as (driver, _server):
        if kind is None:
            await driver.cancel("1")
        else:
            assert type(await error_of(driver.cancel("1"))) is kind


async def test_a_server_that_was_updated_is_asked_for_its_versions_again() -> None:
    """A version that is no longer served gives a 404 without JSON; then the version is chosen again."""
    answers = {
        "GET /slurm/v0.0.42/": response(404, b"Unable to find requested URL", "text/plain"),
        "GET /slurm/v0.0.44/": (200, {"jobs": [{"job_id": 1, "job_state": ["RUNNING"]}]}),
    }
    async with asking(answers) as (driver, server):
        assert isinstance(await error_of(driver.jobs(["1"])), SlurmUnavailable)
        server.answers["GET /openapi/v3"] = (200, {"paths": {"/slurm/v0.0.44/job/submit": {}}})
        assert set(await driver.jobs(["1"])) == {"1"}
        assert server.asked("GET /openapi") == 3


async def test_versions_are_asked_for_once() -> None:
    """Concurrent requests do not ask again."""
    async with asking({"GET /slurm": (404, UNKNOWN)}) as (driver, server):
        await asyncio.gather(*(driver.jobs([str(number)]) for number in range(1, 9)))
        assert server.asked("GET /openapi") == 1


@pytest.mark.parametrize("jobid", ["", "01", "1/../jobs", "1?x", "x", "1_2", "1\r\nX: y"])
async def test_an_invalid_job_id_is_not_requested(jobid: str) -> None:
    """Only digits get into a path."""
    async with asking({}) as (driver, server):
        for asked in (driver.jobs([jobid]), driver.cancel(jobid)):
            await error_of(asked)
        assert server.heard == []


@pytest.mark.parametrize("user", ["", "-x", "a/b", "a\r\nb", "a b"])
def test_an_invalid_user_name_is_refused(user: str) -> None:
    """The name goes into a header, a file's name and a command's argument."""
    with pytest.raises(ValueError, match="is not the name of a user"):
        RestDriver(
            Slurmrestd(RestClient(parse_cluster_url("rest+http://h:1")), FewTokens("t")),
            user,
            find_launcher=lambda _: None,
        )


# -- HTTPS ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A key and its certificate for 127.0.0.1."""
    directory = tmp_path_factory.mktemp("tls")
    key, cert = directory / "key.pem", directory / "cert.pem"
    argv = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=slurmrestd"]
    argv += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    subprocess.run(argv, check=True, capture_output=True)
    return key, cert


@asynccontextmanager
async def asking_by_https(
    certificate: tuple[Path, Path], host: str, ca_file: str
) -> AsyncIterator[tuple[RestDriver, Server]]:
    """A driver and its HTTPS server, under this name."""
    key, cert = certificate
    server = Server({"GET /slurm": (404, UNKNOWN)})
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    listener = await asyncio.start_server(server.handle, "127.0.0.1", 0, ssl=context)
    port = listener.sockets[0].getsockname()[1]
    client = RestClient(parse_cluster_url(f"rest+https://{host}:{port}"), ca_file=ca_file, timeout=10)
    try:
        yield RestDriver(Slurmrestd(client, FewTokens(SECRET)), "ann", find_launcher=lambda _jobid: None), server
    finally:
        client.close()
        listener.close()


async def test_a_server_that_the_ca_file_signs_is_asked(certificate: tuple[Path, Path]) -> None:
    """Under the name or address in its certificate."""
    async with asking_by_https(certificate, "127.0.0.1", str(certificate[1])) as (driver, server):
        assert await driver.jobs(["1"]) == {}
        assert server.asked("GET /slurm") == 1


@pytest.mark.parametrize(("host", "is_signed"), [("127.0.0.1", False), ("localhost", True)])
async def test_another_server_is_sent_nothing(certificate: tuple[Path, Path], host: str, is_signed: bool) -> None:
    """A server with an unknown authority or another name gets no request."""
    async with asking_by_https(certificate, host, str(certificate[1]) if is_signed else "") as (driver, server):
        assert "its certificate is not valid" in str(await error_of(driver.jobs(["1"])))
        assert server.heard == []


@pytest.mark.parametrize("text", ["no certificate", None])
async def test_a_ca_file_that_cannot_be_used(certificate: tuple[Path, Path], tmp_path: Path, text: str | None) -> None:
    """The error names the setting."""
    path = tmp_path / "ca.pem"
    if text is not None:
        path.write_text(text)
    async with asking_by_https(certificate, "127.0.0.1", str(path)) as (driver, server):
        with pytest.raises(ConfigError, match=r"SlurmService\.rest_ca_file"):
            await driver.jobs(["1"])
        assert server.heard == []
