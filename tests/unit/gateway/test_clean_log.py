"""The log shows no secret, no control character, and no flood."""

from __future__ import annotations

import json
import logging
import sys

import pytest

from gateway_slurm._util import RatedLog
from gateway_slurm.gateway.clean_log import MAX_TEXT, CleanFormatter, keep_clean, without_secrets

TOKEN = "gws_0123456789ab_" + "Zz9-_" * 8 + "abc"
HUB = "4f1c" * 8


@pytest.mark.parametrize(
    "text",
    [
        f"refused {TOKEN}",
        f"GET /api/kernels?token={HUB}&x=1",
        f"GET /api?a=1&TOKEN%3D{HUB}",
        f"Authorization: token {HUB}",
        f"authorization: Bearer {HUB}",
        json.dumps({"Authorization": f"token {HUB}"}),
        repr({"Authorization": f"Bearer {HUB}"}),
        repr(b"Authorization: token %s\r\n" % HUB.encode()),
        f"Invalid header value 'token {HUB}'",
        f"Referer: https://hub.example/lab?token={HUB}",
        f"Proxy-Authorization: Basic {HUB}==",
        f"Cookie: _xsrf=2|aa|bb|1; session={HUB}",
        f"JUPYTERHUB_API_TOKEN={HUB}",
    ],
)
def test_a_secret_is_taken_out_wherever_it_stands(text: str) -> None:
    """In URLs, headers, JSON and Python's repr, in any case and encoding."""
    shown = without_secrets(text)
    assert HUB not in shown
    assert "Zz9" not in shown
    assert "[secret]" in shown


@pytest.mark.parametrize(
    "text",
    [
        "the token expired at 2026-01-01 10:00 UTC: ask the gateway's admin for a new one",
        "kernel 12345678-1234-1234-1234-123456789012 (job 17) started on node n1",
        "send it as 'Authorization: token …' (GatewayClient.auth_token of a Jupyter server)",
        "GET /api/kernels 200 3.1ms",
    ],
)
def test_other_text_stays(text: str) -> None:
    """Sentences about tokens, ids and paths are no secrets."""
    assert without_secrets(text).replace("[secret]", "…") == text


def record(message: str, *arguments: object, error: bool = False) -> logging.LogRecord:
    """A record, with the exception that is handled now if ``error``."""
    return logging.LogRecord("x", logging.INFO, "f.py", 1, message, arguments, sys.exc_info() if error else None)


def test_a_record_cannot_begin_a_line_or_control_the_terminal() -> None:
    """Line ends are followed by spaces, escapes are shown; a traceback is cleaned as well."""
    formatter = CleanFormatter(logging.Formatter("%(levelname)s %(message)s"))
    shown = formatter.format(record("a peer sent %s", "\x1b[2J\r\nINFO forged\u202e"))
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert all(line.startswith("    ") for line in shown.split("\n")[1:])
    try:
        raise ValueError(f"\x1b]0;title\x07 token={HUB}")
    except ValueError:
        shown = formatter.format(record("failed", error=True))
    assert "Traceback" in shown
    assert HUB not in shown
    assert "\x1b" not in shown
    assert len(formatter.format(record("x" * 10 * MAX_TEXT))) < 2 * MAX_TEXT
    assert "'%d %d'" in formatter.format(record("%d %d", "no number"))


def test_a_peers_lines_have_a_rate_and_those_left_out_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    """A burst is logged, then one line in two seconds; another peer's lines are not affected."""
    now = [0.0]
    log = logging.getLogger("gateway_slurm.test")
    rated, other = (RatedLog(log, burst=3, seconds=2.0, clock=lambda: now[0]) for _ in range(2))
    with caplog.at_level(logging.INFO, "gateway_slurm.test"):
        for number in range(100):
            rated.info("line %d", number)
        assert caplog.messages == ["line 0", "line 1", "line 2"]
        other.warning("other")
        now[0] = 2.5
        rated.info("later")
    assert caplog.messages[3:] == ["other", "97 more lines were left out before the next one", "later"]


def test_what_strangers_cause_in_tornados_log_has_a_rate(caplog: pytest.LogCaptureFixture) -> None:
    """Malformed requests flood no log; the filters and formatters go with the server."""
    general = logging.getLogger("tornado.general")
    before = list(general.filters)
    restore = keep_clean(logging.getLogger("gateway_slurm.test"))
    with caplog.at_level(logging.INFO, "tornado.general"):
        for number in range(1000):
            general.info("Malformed HTTP message from %s: %s", "192.0.2.1", number)
        general.info("something else")
    restore()
    assert len(caplog.messages) < 50
    assert caplog.messages[-1] == "something else"
    assert general.filters == before
    assert not any(isinstance(handler.formatter, CleanFormatter) for handler in logging.getLogger().handlers)
