"""The gateway does what its own description of its API says, for whatever fits the description and what does not."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import time
import uuid
from importlib import import_module

import hypothesis
import hypothesis.strategies as st
import pytest
import schemathesis
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    ignored_auth,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)
from tornado.httpclient import HTTPRequest
from tornado.websocket import websocket_connect

from gateway_slurm.gateway.app import SlurmGatewayApp
from gateway_slurm.gateway.handlers import DescriptionHandler, UnknownHandler
from gateway_slurm.gateway.openapi import OPERATIONS
from gateway_slurm.gateway.specs.projects import CLIENT_FIELDS
from helpers.gateway_process import running_gateway
from helpers.kernel_clients import READY, jupyter_files_in

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    unsupported_method,
    ignored_auth,
]
ROUTES = [(verb.upper(), path) for path, verbs in OPERATIONS.items() for verb in verbs]
KERNELSPEC = {"kernel_name": "slurm", "path": "logo-svg.svg"}
MSG_ID = "a-cell"
# An example is a request to a server, and those that start kernels take their time.
EXAMPLES = hypothesis.settings(
    max_examples=12, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
)


class Client:
    """A user of the gateway, without a loop."""

    def __init__(self, url: str, token: str) -> None:
        self.address, self.headers = url.removeprefix("http://"), {"Authorization": f"token {token}"}

    def ask(self, verb: str, path: str, body: object = None) -> object:
        """One request; the answer's JSON."""
        connection = http.client.HTTPConnection(self.address, timeout=READY)
        connection.request(verb, path, json.dumps(body) if body is not None else None, self.headers)
        answer = connection.getresponse().read()
        connection.close()
        return json.loads(answer) if answer else None

    def session(self) -> dict[str, str]:
        """A session with a kernel, the one that there is or a new one: values for parameters in paths."""
        body = {"path": "a.ipynb", "kernel": {"name": "slurm"}}
        session = self.ask("POST", "/api/sessions", body)
        if "id" not in session:  # what the examples have started is as many kernels as there may be
            self.end_all()
            session = self.ask("POST", "/api/sessions", body)
        return {"kernel_id": session["kernel"]["id"], "session_id": session["id"], **KERNELSPEC}

    def execution(self) -> dict[str, str]:
        """The same with a cell, which may wait for the kernel."""
        known = self.session()
        asyncio.run(self._send_cell(known["kernel_id"]))
        path = f"/api/kernels/{known['kernel_id']}/executions"
        deadline = time.monotonic() + READY
        while time.monotonic() < deadline:
            if any(one["msg_id"] == MSG_ID for one in self.ask("GET", path)):
                return {**known, "msg_id": MSG_ID}
            time.sleep(0.1)
        raise AssertionError("the cell is not listed")

    async def _send_cell(self, kernel_id: str) -> None:
        request = HTTPRequest(f"ws://{self.address}/api/kernels/{kernel_id}/channels", headers=self.headers)
        websocket = await websocket_connect(request)
        header = {"msg_id": MSG_ID, "msg_type": "execute_request", "session": "page"}
        await websocket.write_message(json.dumps({"channel": "shell", "header": header, "content": {"code": "1"}}))
        websocket.close()
        while await websocket.read_message() is not None:
            pass

    def allocation(self) -> dict[str, str]:
        """The same with a kernel that runs, and its job."""
        deadline = time.monotonic() + READY
        while time.monotonic() < deadline:
            known = self.session()
            kernel = self.ask("GET", f"/api/kernels/{known['kernel_id']}")
            jobid = (kernel.get("slurm") or {}).get("jobid")
            jobs = {job["jobid"]: job["state"] for job in self.ask("GET", "/api/allocations")}
            if jobs.get(jobid) == "RUNNING":
                return {**known, "jobid": jobid}
            if kernel["execution_state"] == "dead":
                self.end_all()
            time.sleep(0.1)
        raise AssertionError(f"no kernel runs in an allocation: {kernel}")

    def end_all(self) -> None:
        for kernel in self.ask("GET", "/api/kernels"):
            self.ask("DELETE", f"/api/kernels/{kernel['id']}")
        for job in self.ask("GET", "/api/allocations"):  # one that is kept stays after its kernels
            self.ask("DELETE", f"/api/allocations/{job['jobid']}")


@pytest.fixture(scope="module")
def module_client(cluster, jupyter_base):
    """A gateway of few kernels, whose allocations its users may keep, and its user."""
    options = ["--SlurmMappingKernelManager.max_kernels=2", "--SlurmMappingKernelManager.max_starts_per_minute=0"]
    options += [f"--GatewayKernelSpecManager.allowed_client_fields={[*CLIENT_FIELDS, 'keep_allocation']}"]
    with jupyter_files_in(jupyter_base), running_gateway(jupyter_base / "openapi", *options) as gateway:
        yield Client(gateway.url, gateway.tokens["alice"])


@pytest.fixture
def client(module_client, kernelspecs):
    """The user, with kernelspecs, and at the end without kernels."""
    (kernelspecs / "kernels" / KERNELSPEC["kernel_name"] / KERNELSPEC["path"]).write_text("<svg/>")
    yield module_client
    module_client.end_all()


@pytest.fixture(scope="module")
def schema(module_client):
    """The description as the gateway hands it out, to anybody."""
    return schemathesis.openapi.from_url(f"http://{module_client.address}/api/spec.json")


def test_the_description_has_every_operation(schema):
    """All that the table has, and no more."""
    described = {(result.ok().method.upper(), result.ok().path) for result in schema.get_all_operations()}
    assert described == set(ROUTES)


def test_every_route_is_described():
    """What the gateway serves by itself, all of it but the description; the rest of its paths is what there is not."""
    ids = {name: str(uuid.uuid4()) for name in ("kernel_id", "session_id", "msg_id")}
    values = {**ids, "jobid": "7", **KERNELSPEC}
    described = {path.format_map(values) for path in OPERATIONS}
    served = [
        (pattern, handler)
        for one in SlurmGatewayApp().extra_services
        for pattern, handler in import_module(one).default_handlers
    ]
    for pattern, handler in served:
        assert handler in (DescriptionHandler, UnknownHandler) or any(
            re.fullmatch(pattern, path) for path in described
        ), pattern


@pytest.mark.parametrize(("verb", "path"), ROUTES, ids=str)
def test_an_operation_answers_as_described(client, schema, verb, path):
    """Random ids and bodies, of the description's kind and others: no status but those described, and no 5xx."""
    operation = schema[path][verb]
    either = st.one_of(*map(operation.as_strategy, (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)))

    @EXAMPLES
    @hypothesis.given(case=either)
    def ask(case):
        case.call_and_validate(headers=client.headers, checks=CHECKS, timeout=READY)

    ask()


@pytest.mark.slow
@pytest.mark.parametrize(("verb", "path"), [route for route in ROUTES if "{" in route[1]], ids=str)
def test_an_operation_on_what_is_there_answers_as_described(client, schema, verb, path):
    """What the path names exists: a kernel, a session, an allocation, in whichever state the example before has left
    them; a kernelspec and its logo. What is not of JSON, and does not end what it is of, is done.
    """
    operation = schema[path][verb]
    makers = {"{kernel_name}": lambda: KERNELSPEC, "{jobid}": client.allocation, "{msg_id}": client.execution}
    known = next((make for name, make in makers.items() if name in path), client.session)()
    names = [name for name in known if f"{{{name}}}" in path]
    statuses = set()

    @EXAMPLES
    @hypothesis.given(case=operation.as_strategy(path_parameters={name: known[name] for name in names}))
    def ask(case):
        response = case.call_and_validate(headers=client.headers, checks=CHECKS, timeout=READY)
        assert response.status_code != 404 or verb in ("DELETE", "PATCH")
        statuses.add(response.status_code)

    ask()
    if (verb == "GET" and not path.endswith("/channels")) or "{jobid}" in path:
        assert statuses & {200, 204}
