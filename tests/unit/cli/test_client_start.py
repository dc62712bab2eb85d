"""The client's check where the answer to its start is lost: its kernel is ended, or the user gets its id."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from types import SimpleNamespace

import pytest
from tornado import web
from tornado.httpserver import HTTPServer
from tornado.testing import bind_unused_port

from gateway_slurm.cli.doctor.client import ClientCheck


class Kernels(web.RequestHandler):
    """A gateway behind a proxy: what each request is answered, and what was asked for."""

    def initialize(self, site: SimpleNamespace) -> None:
        self.site = site

    def post(self, _path: object) -> None:
        body = json.loads(self.request.body)
        self.site.started.append(body["kernel_id"])
        self.set_status(self.site.on_post)
        if self.site.message:
            self.finish({"message": self.site.message})

    def delete(self, kernel_id: str) -> None:
        self.site.deleted.append(kernel_id)
        self.set_status(self.site.on_delete)
        if self.site.on_delete == 404:
            self.finish({"message": "there is no kernel"})


@pytest.fixture
async def site() -> AsyncIterator[SimpleNamespace]:
    """The gateway; by default the proxy does not wait for its answer."""
    state = SimpleNamespace(on_post=504, message="", on_delete=204, started=[], deleted=[], url="")
    server = HTTPServer(web.Application([(r"/api/kernels(?:/(.+))?", Kernels, {"site": state})]))
    sock, port = bind_unused_port()
    server.add_socket(sock)
    state.url = f"http://127.0.0.1:{port}"
    yield state
    server.stop()
    await server.close_all_connections()


async def checked(site: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[bool, str]]:
    """The results of the start and of what follows it."""
    check = ClientCheck(site.url, "", "slurm", 10.0, show=lambda _line: None)
    check._client = SimpleNamespace(load_connection_args=dict)
    monkeypatch.setattr(check, "_checks", lambda: [("start", check._start)])
    await check.run()
    return {result.step: (result.ok, f"{result.message} | {result.change}") for result in check.results}


async def test_a_kernel_whose_start_was_not_answered_is_ended(site, monkeypatch):
    """By the id that the client chose: no other kernel of the user is touched."""
    results = await checked(site, monkeypatch)
    assert not results["start"][0]
    assert results["delete"] == (True, "the kernel was ended | ")
    assert site.deleted == site.started


async def test_the_user_learns_of_a_kernel_that_may_still_come(site, monkeypatch):
    """The message has the kernel's id, and where to look."""
    site.on_delete = 404
    ok, text = (await checked(site, monkeypatch))["delete"]
    assert not ok
    assert [word for word in (*site.started, "may run", "running kernels") if word not in text] == []


async def test_a_start_that_the_gateway_refuses_leaves_nothing_to_end(site, monkeypatch):
    """It has answered, so no kernel comes."""
    site.on_post, site.message = 503, "too many kernels"
    assert list(await checked(site, monkeypatch)) == ["start"]
    assert site.deleted == []
