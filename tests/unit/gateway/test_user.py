"""Whom a kernel belongs to, and what of a request is its token."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
from tornado.httputil import HTTPHeaders, HTTPServerRequest, RequestStartLine
from traitlets import TraitError

from gateway_slurm._util import is_user_name
from gateway_slurm.errors import NotAllowed, RequestError
from gateway_slurm.gateway.auth.identity import GatewayIdentityProvider
from gateway_slurm.gateway.auth.tokens import request_token, take_url_token
from gateway_slurm.gateway.auth.user import GatewayUser, kernel_owner

ADA, HUB = GatewayUser("ada"), GatewayUser("hub", service=True)


@pytest.mark.parametrize(
    ("user", "env", "owner"),
    [
        (ADA, {}, "ada"),
        (ADA, {"KERNEL_USERNAME": ""}, "ada"),
        (ADA, {"KERNEL_USERNAME": "ada"}, "ada"),
        (HUB, {}, "hub"),
        (HUB, {"KERNEL_USERNAME": "ben"}, "ben"),
        (GatewayUser("root-of-all", admin=True), {}, "root-of-all"),
    ],
)
def test_a_kernel_belongs_to_its_client_or_to_the_user_that_a_service_names(user, env, owner):
    """Users act as themselves; a service acts for the user whom it names, or as itself."""
    assert kernel_owner(user, env) == owner


@pytest.mark.parametrize("user", [ADA, GatewayUser("root-of-all", admin=True)])
@pytest.mark.parametrize("name", ["ben", "Ada", "ada.", "hub"])
def test_only_a_service_starts_kernels_for_others(user, name):
    """Not even an admin; the message says whom they are known as."""
    with pytest.raises(NotAllowed, match=user.username) as caught:
        kernel_owner(user, {"KERNEL_USERNAME": name})
    assert caught.value.field == "KERNEL_USERNAME"


@pytest.mark.parametrize("name", [" ada", "ada\n", "-rf", "../ada", "a" * 256, "0", "a;b", "a b", "ada\0", "äda", 5])
def test_a_service_cannot_name_what_is_no_user(name):
    """What is not a safe name is invalid, not forbidden."""
    with pytest.raises(RequestError, match="not a user's name") as caught:
        kernel_owner(HUB, {"KERNEL_USERNAME": name})
    assert not isinstance(caught.value, NotAllowed)


def test_usual_names_are_names():
    """Unix accounts, mail addresses, names of machines and of a directory's users can be users."""
    usual = ["ada", "ada.lovelace@example.org", "_apt", "user1", "1st", "a-b_c", "A" * 255]
    assert all(map(is_user_name, [*usual, "1234567a", "CORP\\ann", "CORP+ann", "pc7$", "a" * 40]))
    refused = ["٣", "123", "-a", "#0", "%users", "+a", "\\a", "a b", "a:b", "a/b", "a\n", "a" * 256]
    assert not any(map(is_user_name, [None, 5, b"ada", "", *refused]))


def request(uri: str, *authorization: str) -> HTTPServerRequest:
    """A GET for ``uri``."""
    headers = HTTPHeaders({"Host": "gateway"})
    for value in authorization:
        headers.add("Authorization", value)
    return HTTPServerRequest(headers=headers, start_line=RequestStartLine("GET", uri, "HTTP/1.1"))


def test_a_token_is_taken_out_of_the_url_whole():
    """Wherever it stands, however it is spelt, however often: nothing of it is left in what handlers and logs see."""
    for uri in (
        "/x?token=hunter2",
        "/x?a=1&token=hunter2&b=2",
        "/x?tok%65n=hunter2&token=hunter2",
        "/x?b=1&token=hunter%32",
    ):
        one = request(uri)
        assert take_url_token(one) == "hunter2"
        assert "hunter" not in f"{one.uri} {one.query} {one.arguments} {one.query_arguments} {one!r}"
        assert one.full_url().endswith(one.uri)
        assert one.path == "/x"
    one = request("/x?a=1&token=hunter2&b=2")
    take_url_token(one)
    assert one.query_arguments == {"a": [b"1"], "b": [b"2"]}


def test_a_url_without_a_token_is_left_alone():
    """Other parameters, and those that only look like it, stay."""
    for uri in ("/x", "/x?", "/x?tokens=1", "/x?a=token", "/x?_xsrf=token=1"):
        one = request(uri)
        assert take_url_token(one) is None
        assert one.uri == uri


@pytest.mark.parametrize("values", [[], ["token"], ["Basic abc"], ["token a", "token b"], ["token " + "x" * 5000]])
def test_what_is_not_one_token_is_none(values):
    """Two headers, another scheme, or something endless are no token."""
    assert request_token(request("/", *values)) is None


# -- settings that a hub gives to its services ------------------------------------------------------------


def test_a_hubs_service_asks_the_hub_for_its_own_scope(monkeypatch):
    """What JupyterHub sets for a service it runs is enough; without it, and without settings, there is no hub."""
    monkeypatch.delenv("JUPYTERHUB_API_URL", raising=False)
    monkeypatch.delenv("JUPYTERHUB_OAUTH_ACCESS_SCOPES", raising=False)
    assert GatewayIdentityProvider().authenticators == []
    monkeypatch.setenv("JUPYTERHUB_API_URL", "http://127.0.0.1:8081/hub/api")
    monkeypatch.setenv("JUPYTERHUB_OAUTH_ACCESS_SCOPES", '["access:services!service=gateway"]')
    provider = GatewayIdentityProvider()
    assert len(provider.authenticators) == 1
    assert provider.hub_scopes == ["access:services!service=gateway"]


def test_a_token_for_all_users_cannot_be_set(monkeypatch):
    """Jupyter's own token, from the environment or a setting, opens nothing here."""
    monkeypatch.setenv("JUPYTER_TOKEN", "everybodys")
    provider = GatewayIdentityProvider()
    assert provider.token == ""
    with pytest.raises(TraitError):
        provider.token = "everybodys"  # noqa: S105 - it is refused
    assert not provider.login_available
    assert provider.get_handlers() == []


@pytest.mark.parametrize(
    ("proxies", "warned"),
    [(["unix"], False), (["10.1.0.7"], False), (["127.0.0.2"], True), (["0.0.0.0/0"], True), (["unix", "::1"], True)],
)
def test_a_header_that_everybody_on_the_machine_can_send_is_warned_of(proxies, warned, caplog):
    """A proxy that is trusted by a loopback address is no better than any user of the machine."""
    provider = GatewayIdentityProvider(trusted_header="X-Remote-User", trusted_proxies=proxies)
    provider.log = logging.getLogger("provider")
    provider.validate_security(SimpleNamespace(ip="localhost", sock=""), None)
    assert ("every user of this host" in caplog.text) == warned
