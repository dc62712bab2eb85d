"""``jupyter slurm doctor --gateway-url`` tells what is wrong between a user's Jupyter server and a gateway."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import ssl
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from jupyter_server.gateway.gateway_client import GatewayClient

from gateway_slurm.cli.doctor.client import ClientCheck, seconds_of_retries
from gateway_slurm.gateway.auth.tokens import TokenFile
from helpers.doctor_cli import command
from helpers.kernel_clients import READY, jupyter_files_in
from helpers.proxies import ETC, Certificate, Proxy, gateway_on_socket, nginx

NO_UPGRADE = {"proxy_set_header Upgrade $http_upgrade;": "", "$gateway_slurm_connection;": '"";'}


@dataclass
class Site:
    """A gateway behind proxies: one in order, one that passes no websockets, one whose gateway is away."""

    good: Proxy
    no_websockets: Proxy
    away: Proxy
    tokens: dict[str, str]


@pytest.fixture(scope="module")
def site(cluster, jupyter_base):
    """The gateway and its proxies; tokens that are good, expired and unknown."""
    with jupyter_files_in(jupyter_base), gateway_on_socket(jupyter_base) as gateway:
        certificate = Certificate.make(jupyter_base)
        directories = [jupyter_base / f"nginx{number}" for number in range(3)]
        for directory in directories:
            directory.mkdir()
        expired = TokenFile(jupyter_base / "tokens.json").add("alice", days=-1)
        gone = replace(gateway, url="/nonexistent/gateway.sock")
        with (
            nginx(directories[0], gateway, certificate, knows_users=False) as good,
            nginx(directories[1], gateway, certificate, knows_users=False, mistakes=NO_UPGRADE) as no_websockets,
            nginx(directories[2], gone, certificate, knows_users=False) as away,
        ):
            tokens = {"good": gateway.tokens["alice"], "expired": expired, "unknown": expired[:-1] + "_"}
            yield Site(good, no_websockets, away, tokens)


Result = tuple[int, dict[str, dict[str, Any]]]


@pytest.fixture
def command_line(site, tmp_path, monkeypatch):
    """Run the command; it gives its exit status and the steps."""
    monkeypatch.setenv("JUPYTER_CONFIG_DIR", str(tmp_path))

    def run(url: str, **settings: Any) -> Result:
        settings.setdefault("auth_token", site.tokens["good"])
        (tmp_path / "jupyter_server_config.json").write_text(json.dumps({"GatewayClient": settings}))
        argv = command(f"--gateway-url={url}", "--json", "--kernelspec=physics.python")
        done = subprocess.run(argv, capture_output=True, text=True, timeout=2 * READY, check=False)
        assert done.stderr == ""
        return done.returncode, {step["step"]: step for step in json.loads(done.stdout)["walk"]}

    return run


@pytest.fixture
def check(site, tmp_path, monkeypatch):
    """As ``command_line``, with a token file, and without a new Python for each: these take seconds."""
    monkeypatch.setenv("JUPYTER_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("SSL_CERT_FILE", str(site.good.certificate.file))
    # Tornado reads SSL_CERT_FILE once in a process.
    context = ssl.create_default_context(cafile=str(site.good.certificate.file))
    monkeypatch.setattr("tornado.simple_httpclient._client_ssl_defaults", lambda: context)
    token_file = tmp_path / "token"
    token_file.touch(mode=0o600)

    def run(url: str, name: str = "good", kernelspec: str = "physics.python", **settings: Any) -> Result:
        token_file.write_text(site.tokens[name] + "\n")
        (tmp_path / "jupyter_server_config.json").write_text(json.dumps({"GatewayClient": settings}))
        given = "" if "auth_token" in settings else str(token_file)
        found = ClientCheck(url, given, kernelspec, 120.0, show=lambda _line: None)
        asyncio.run(found.run())
        return 3 if found.failed else 0, {result.step: result.row() for result in found.results}

    return run


def refused(result: Result, step: str, *words: str) -> bool:
    """Whether the check failed at this step, with these words in its message or its advice."""
    status, steps = result
    text = f"{steps[step]['said']} | {steps[step]['change']}"
    assert [key for key, found in steps.items() if not found["ok"]] == [step], steps
    assert [word for word in words if word not in text] == [], text
    return status == 3


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_each_mistake_of_a_client_is_named(site, check, tmp_path):
    """From the settings to the websocket: the first step that fails says what is wrong and what to change."""
    url = site.good.url
    assert refused(check(url, "expired"), "token", "the token expired at", "ask the gateway's admin")
    assert refused(check(url, "unknown"), "token", "does not know this token")
    assert refused(check(url, auth_scheme="Basic"), "token", "the scheme Basic", "'Authorization: token …'")
    assert refused(check(url, auth_token=""), "client", "there is no token")
    (tmp_path / "token").chmod(0o644)
    assert refused(check(url), "client", "other users may read", "chmod 600")
    (tmp_path / "token").chmod(0o600)

    assert refused(check("https://no-such-host.invalid"), "name", "'no-such-host.invalid'", "VPN")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{unused.getsockname()[1]}"
        assert refused(check(closed), "connect", "Connection refused", "is down")
    assert refused(check(url.replace("https", "http")), "token", "400", "URL's path")
    assert refused(check(f"{url}/elsewhere"), "token", "404")
    assert refused(check(site.away.url), "token", "does not reach the gateway: 502")
    assert refused(check(url, kernelspec="nosuch"), "kernelspecs", "'nosuch'", "physics.python")
    assert refused(check(site.no_websockets.url), "websocket", "Upgrade and Connection")


def test_a_gateway_in_order_passes_and_an_unknown_authority_is_named(site, command_line, monkeypatch):
    """The command starts a kernel and ends it; without SSL_CERT_FILE the certificate's step says what to set."""
    url, authority = site.good.url, str(site.good.certificate.file)
    monkeypatch.setenv("SSL_CERT_FILE", authority)
    status, steps = command_line(url, gateway_retry_max=5)
    assert (status, [key for key, step in steps.items() if not step["ok"]]) == (0, []), steps
    assert steps["websocket"]["said"] == "2"
    assert steps["token"]["said"] == "you are alice"
    assert "gives up a gateway that is away for 31 s" in steps["client"]["said"]
    monkeypatch.delenv("SSL_CERT_FILE")
    status, steps = result = command_line(url, ca_certs=authority)
    assert refused(result, "tls", "self-signed certificate", "SSL_CERT_FILE")
    assert "GatewayClient.ca_certs has no effect" in steps["client"]["said"]


def read_client_configuration(monkeypatch: pytest.MonkeyPatch, home: Path, token: str) -> SimpleNamespace:
    """GatewayClient's section of etc/client, read with this token in the environment, "" for none."""
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("JUPYTER_GATEWAY_AUTH_TOKEN", token)
    config = SimpleNamespace(GatewayClient=SimpleNamespace())
    path = ETC / "client/jupyter_server_config.py"
    exec(compile(path.read_text(), path, "exec"), {"get_config": lambda: config})  # noqa: S102 - a file of ours
    return config.GatewayClient


def test_the_clients_configuration_keeps_the_token_out_of_the_environment(monkeypatch, tmp_path):
    """jupyter_server logs the environment with each kernel's start; a gateway that is away is tried for minutes."""
    section = read_client_configuration(monkeypatch, tmp_path, "from-the-environment")
    assert section.auth_token == "from-the-environment"  # noqa: S105
    assert "JUPYTER_GATEWAY_AUTH_TOKEN" not in os.environ
    assert seconds_of_retries(GatewayClient()) == 31
    assert seconds_of_retries(GatewayClient(**vars(section))) > 500
    secret = tmp_path / ".config/gateway_slurm/token"
    secret.parent.mkdir(parents=True)
    secret.touch(mode=0o600)
    secret.write_text("from-the-file\n")
    assert read_client_configuration(monkeypatch, tmp_path, "").auth_token == "from-the-file"  # noqa: S105
