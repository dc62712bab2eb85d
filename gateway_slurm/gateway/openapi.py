"""The gateway's API in OpenAPI 3.1: one table of paths, with what the handlers accept and answer."""

from __future__ import annotations

from typing import Any

from gateway_slurm import __version__
from gateway_slurm.gateway.executions import MAX, STATUSES

_UUID = {"type": "string", "format": "uuid"}
_TEXT = {"type": "string"}
_NUMBER = {"type": "integer"}


def _object(*required: str, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required)}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _list(name: str) -> dict[str, Any]:
    return {"type": "array", "items": _ref(name)}


def _map(values: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": values}


_TEXT_OR_NULL = {"type": ["string", "null"]}
_TIME = {**_TEXT_OR_NULL, "description": "UTC"}
_EXECUTION: dict[str, Any] = {
    "msg_id": {**_TEXT, "description": "of the execute_request"},
    "cell_id": {**_TEXT_OR_NULL, "description": "the notebook's cell, where the frontend names it"},
    "session": {**_TEXT, "description": "the websocket's session that sent it"},
    "status": {"enum": list(STATUSES)},
    "reason": {**_TEXT, "description": "why it ended, where the server ended it"},
    "execution_count": {"type": ["integer", "null"]},
    "queued": _TIME,
    "started": _TIME,
    "ended": _TIME,
    "input": {
        "type": ["object", "null"],
        "description": "what it waits for the user to type",
        "properties": {"prompt": _TEXT, "password": {"type": "boolean"}},
    },
    "first": {**_NUMBER, "description": "number of its first message; 0 before it"},
    "number": {**_NUMBER, "description": "number of its last message"},
    "running": {"type": "boolean", "description": "it is queued, or runs"},
}
_KERNEL_CHOICE = _object(id=_UUID, name=_TEXT)
SCHEMAS: dict[str, Any] = {
    "Error": _object("message", message=_TEXT, reason=_TEXT),
    "Kernel": _object(
        *("id", "name", "last_activity", "execution_state", "connections"),
        id=_UUID,
        name=_TEXT,
        last_activity=_TEXT,
        execution_state=_TEXT,
        connections=_NUMBER,
        reason={**_TEXT, "description": "why the kernel is dead"},
        slurm={
            "type": "object",
            "description": "jobid and node; while the kernel waits also state, reason, place, expected_start, and all "
            "of it in a sentence, waiting",
            "properties": {
                "connect": {
                    "type": ["object", "null"],
                    "description": "how clients connect to the kernel, once it has started",
                    "properties": {"mode": {"enum": ["direct", "tunnel"]}, "why": _TEXT},
                },
                "directory": {
                    "type": "object",
                    "description": "where the kernel started on its node, and why it is not where the client wanted",
                    "properties": {"path": _TEXT, "why": _TEXT},
                },
            },
        },
    ),
    "NewKernel": _object(name=_TEXT, kernel_id=_UUID, env=_map(_TEXT)),
    "Session": _object("id", "path", "kernel", id=_UUID, path=_TEXT, name=_TEXT, type=_TEXT, kernel=_ref("Kernel")),
    "NewSession": _object(
        "path", path={**_TEXT, "minLength": 1}, name=_TEXT, type=_TEXT, kernel=_KERNEL_CHOICE, env=_map(_TEXT)
    ),
    "SessionChange": _object(path=_TEXT, name=_TEXT, type=_TEXT, kernel=_KERNEL_CHOICE),
    "KernelSpec": _object("name", "spec", name=_TEXT, spec={"type": "object"}, resources={"type": "object"}),
    "KernelSpecs": _object("default", "kernelspecs", default=_TEXT, kernelspecs=_map(_ref("KernelSpec"))),
    "Execution": _object(*_EXECUTION, **_EXECUTION),
    "ExecutionWithOutputs": _object(
        *(*_EXECUTION, "outputs", "dropped", "complete"),
        **_EXECUTION
        | {
            "number": {
                **_NUMBER,
                "description": "the messages up to this number are in the outputs: the websocket "
                "with since=NUMBER sends those after it",
            },
            "outputs": {"type": "array", "items": {"type": "object"}, "description": "as nbformat 4 has them"},
            "dropped": {**_NUMBER, "description": "characters that are left out, beyond what is kept of one cell"},
            "complete": {
                "type": "boolean",
                "description": "false where the outputs are not kept any more, and the node cannot send them",
            },
        },
    ),
    "Logs": _object("kernel", "launcher", kernel=_TEXT, launcher=_TEXT),
    "Allocation": _object("jobid", jobid=_TEXT, state=_TEXT, kernel_ids={"type": "array", "items": _TEXT}),
    "Status": _object("started", "kernels", started=_TEXT, last_activity=_TEXT, kernels=_NUMBER, connections=_NUMBER),
    "Health": _object("status", status=_TEXT, reason=_TEXT),
    "Version": _object("version", version=_TEXT),
    "Me": _object("identity", identity={"type": "object"}, permissions={"type": "object"}),
}

_PARAMETERS = {
    "kernel_id": _UUID,
    "session_id": _UUID,
    "kernel_name": {"type": "string", "pattern": r"^[A-Za-z0-9_.\-]+$"},
    "jobid": {"type": "string", "pattern": "^[1-9][0-9]{0,9}$"},
    "msg_id": {"type": "string", "pattern": r"^[A-Za-z0-9_\-]{1,200}$"},
    "path": {"type": "string", "pattern": r"^(kernel\.js|kernel\.css|logo-[A-Za-z0-9_.\-]+)$"},
}
_SERVICES_USER = "the user for which a service requests the list; other clients may name themselves only"
_QUERIES: dict[str, dict[str, dict[str, Any]]] = {
    "/api/kernelspecs": {"user": {"schema": _TEXT, "description": _SERVICES_USER}},
    "/api/kernels/{kernel_id}/executions": {
        "cell_id": {"schema": _TEXT, "description": "those of this cell only"},
        "limit": {"schema": {"type": "integer", "minimum": 1, "maximum": MAX}, "description": "the newest ones only"},
    },
}

# By path and method: the summary, the body's schema or "", the status of success, and the answer: "" for none, a schema
# of JSON, or a media type.
OPERATIONS: dict[str, dict[str, tuple[str, str, int, str | dict[str, Any]]]] = {
    "/api": {"get": ("The version of the server", "", 200, "Version")},
    "/api/status": {"get": ("When the gateway was started, and what the user has", "", 200, "Status")},
    "/api/me": {"get": ("The user's identity", "", 200, "Me")},
    "/api/kernels": {
        "get": ("The user's kernels", "", 200, _list("Kernel")),
        "post": ("Start a kernel; answers at once", "NewKernel", 201, "Kernel"),
    },
    "/api/kernels/{kernel_id}": {
        "get": ("One kernel", "", 200, "Kernel"),
        "delete": ("End the kernel, or cancel its start", "", 204, ""),
    },
    "/api/kernels/{kernel_id}/interrupt": {"post": ("Interrupt the kernel", "", 204, "")},
    "/api/kernels/{kernel_id}/restart": {"post": ("Restart the kernel in its allocation", "", 200, "Kernel")},
    "/api/kernels/{kernel_id}/logs": {
        "get": ("The ends of the logs of the kernel and of its launcher", "", 200, "Logs")
    },
    "/api/kernels/{kernel_id}/executions": {
        "get": ("The kernel's last executions, the newest first", "", 200, _list("Execution"))
    },
    "/api/kernels/{kernel_id}/executions/{msg_id}": {
        "get": ("One execution, with its outputs", "", 200, "ExecutionWithOutputs")
    },
    "/api/kernels/{kernel_id}/channels": {
        "get": (
            "The kernel's channels: a websocket, with v1.kernel.websocket.jupyter.org or without a subprotocol",
            "",
            101,
            "",
        )
    },
    "/api/sessions": {
        "get": ("The user's sessions", "", 200, _list("Session")),
        "post": ("The document's session, new or existing", "NewSession", 201, "Session"),
    },
    "/api/sessions/{session_id}": {
        "get": ("One session", "", 200, "Session"),
        "patch": ("Rename the session's document, or give it another kernel", "SessionChange", 200, "Session"),
        "delete": ("End the session, and its kernel", "", 204, ""),
    },
    "/api/kernelspecs": {"get": ("The kernelspecs that the user may start", "", 200, "KernelSpecs")},
    "/api/kernelspecs/{kernel_name}": {"get": ("One kernelspec", "", 200, "KernelSpec")},
    "/kernelspecs/{kernel_name}/{path}": {"get": ("A kernelspec's logo, kernel.js or kernel.css", "", 200, "*/*")},
    "/api/allocations": {"get": ("The user's allocations", "", 200, _list("Allocation"))},
    "/api/allocations/{jobid}": {
        "get": ("One allocation", "", 200, "Allocation"),
        "delete": ("End the allocation now, with its kernels", "", 204, ""),
    },
    "/api/allocations/{jobid}/keep": {"post": ("Keep the allocation after its last kernel", "", 204, "")},
    "/api/allocations/{jobid}/release": {"post": ("Keep the allocation no longer than its last kernel", "", 204, "")},
    "/metrics": {"get": ("Metrics for Prometheus, for admins and named users", "", 200, "text/plain")},
    "/health/live": {"get": ("Whether the process answers", "", 200, "Health")},
    "/health/ready": {"get": ("Whether kernels can be started", "", 200, "Health")},
}
# Answered by Jupyter's handlers, whose errors are pages of HTML.
_PAGES = ("/api/kernels/{kernel_id}/channels",)
_OPEN = ("/health/live", "/health/ready", "/api")


def description(base_url: str) -> dict[str, Any]:
    """The whole description, for a gateway at ``base_url``."""
    return {
        "openapi": "3.1.0",
        "info": {"title": "gateway_slurm", "version": __version__},
        "servers": [{"url": base_url.rstrip("/") or "/"}],
        "security": [{"token": []}],
        "paths": {path: _path(path, methods) for path, methods in OPERATIONS.items()},
        "components": {
            "schemas": SCHEMAS,
            "securitySchemes": {
                "token": {"type": "apiKey", "in": "header", "name": "Authorization", "description": "token TOKEN"}
            },
        },
    }


def _path(path: str, methods: dict[str, tuple[str, str, int, str | dict[str, Any]]]) -> dict[str, Any]:
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": schema}
        for name, schema in _PARAMETERS.items()
        if f"{{{name}}}" in path
    ]
    parameters += [{"name": name, "in": "query", **query} for name, query in _QUERIES.get(path, {}).items()]
    operations = {method: _operation(path, *operation) for method, operation in methods.items()}
    return {**({"parameters": parameters} if parameters else {}), **operations}


def _operation(path: str, summary: str, body: str, status: int, answer: str | dict[str, Any]) -> dict[str, Any]:
    success: dict[str, Any] = {"description": "done"}
    if isinstance(answer, str) and "/" in answer:
        success["content"] = {answer: {"schema": _TEXT}}
    elif answer:
        schema = _ref(answer) if isinstance(answer, str) else answer
        success["content"] = {"application/json": {"schema": schema}}
    content = {"application/json": {"schema": _ref("Error")}}
    if path in _PAGES:
        content["text/html"] = {"schema": _TEXT}
    failure = {"description": "the reason", "content": content}
    responses = {str(status): success, "4XX": failure, "5XX": failure}
    operation: dict[str, Any] = {"summary": summary, "responses": responses}
    if body:
        operation["requestBody"] = {"content": {"application/json": {"schema": _ref(body)}}}
    if path in _OPEN:
        operation["security"] = []
    return operation
