"""What an admin sees of a gateway's users: lines of its log, metrics for Prometheus, and the audit log."""

from __future__ import annotations

import json
import re
import uuid
from pathlib import Path
from typing import Any

import pytest

from helpers.failing_starts import all_nodes_taken
from helpers.gateway_process import Gateway, ask, running_gateway, stop
from helpers.kernel_clients import READY, poll_async

CODE = "print('se' + 'cret-output')"


def events_in(file: Path) -> list[dict[str, Any]]:
    """The events of an audit log that is being written."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def has(kind: str, file: Path) -> bool:
    """Whether an event of this kind is in the audit log."""
    return any(event["event"] == kind for event in events_in(file))


@pytest.fixture(scope="module")
def module_gateway(gateway_environment):
    """One gateway for the tests here, with an audit log."""
    directory = gateway_environment / "watched"
    options = [
        f"--SlurmGatewayApp.audit_log={directory / 'audit.jsonl'}",
        "--SlurmGatewayApp.metrics_max_users=1",
        "--GatewayIdentityProvider.metrics_users=['portal']",
        "--SlurmMappingKernelManager.max_kernels_per_user=1",
    ]
    with running_gateway(directory, *options) as gateway:
        yield gateway
    assert events_in(directory / "audit.jsonl")[-1]["event"] == "gateway_stopped"


@pytest.fixture
def gateway(module_gateway, kernelspecs) -> Gateway:
    """The gateway, with kernelspecs."""
    return module_gateway


async def test_log_metrics_and_audit_log_tell_the_life_of_a_kernel_and_the_refusals(gateway):
    """Who started what, where and with what, how long it took, how it ended; without code, output or forged lines."""
    alice, audit = gateway.of("alice"), gateway.log.parent / "audit.jsonl"
    body = {"path": "work/my\n2026 plan.ipynb", "type": "notebook", "kernel": {"name": "physics.python"}}
    session = await alice.json("POST", "/api/sessions", body)
    kernel_id = session["kernel"]["id"]
    assert await ask(alice, kernel_id, CODE) == "secret-output"
    jobid = (await alice.json("GET", f"/api/kernels/{kernel_id}"))["slurm"]["jobid"]
    assert await alice.status("POST", "/api/kernels", {"name": "physics.python"}) == 429
    assert await gateway.of("bob").status("POST", "/api/kernels", {"name": "no\nsuch"}) == 404
    assert await gateway.of("bob").status("POST", "/api/kernels", {"kernel_id": kernel_id}) == 409
    for_alice = {"name": "physics.python", "env": {"KERNEL_USERNAME": "alice"}}
    assert await gateway.of("portal").status("POST", "/api/kernels", for_alice) == 429
    for _ in range(40):
        assert await gateway.anyone.status("GET", "/api/kernels") == 403
    metrics = (await gateway.of("portal").request("GET", "/metrics")).body.decode()
    await gateway.of("carol").request("DELETE", f"/api/kernels/{kernel_id}")

    assert await poll_async(lambda: has("allocation_released", audit), timeout=READY)
    events = events_in(audit)
    assert audit.stat().st_mode & 0o777 == 0o600
    mine = [event for event in events if event.get("kernel_id") == kernel_id or event.get("jobid") == jobid]
    assert [event["event"] for event in mine] == [
        "kernel_requested",
        "allocation_submitted",
        "kernel_started",
        "kernel_shutdown",
        "kernel_ended",
        "allocation_released",
    ]
    started, shutdown, ended = mine[2:5]
    assert {name: started[name] for name in ("user", "kernelspec", "notebook", "project", "partition", "jobid")} == {
        "user": "alice",
        "kernelspec": "physics.python",
        "notebook": "my_2026_plan.ipynb",
        "project": "demo",
        "partition": "batch",
        "jobid": jobid,
    }
    assert (started["nodes"], started["time_limit"], started["node"]) == (1, 10, "c1")
    assert started["queue_seconds"] > 0 < started["start_seconds"]
    assert (shutdown["user"], shutdown["by"]) == ("alice", "carol")
    assert ended["reason"] == "exit code 0"
    refused = [event for event in events if event["event"] == "kernel_refused"]
    assert [(event["user"], event.get("by"), event["outcome"]) for event in refused] == [
        ("alice", None, "over_limit"),
        ("bob", None, "unknown_kernelspec"),
        ("bob", None, "taken_id"),
        ("alice", "portal", "over_limit"),
    ]
    logins = [event for event in events if event["event"] == "login_refused"]
    assert (len(logins), logins[0]["address"]) == (30, "127.0.0.1")

    log = gateway.log.read_text()
    (line,) = [line for line in log.splitlines() if "kernel started: " in line and kernel_id in line]
    assert re.search(rf"user=alice kernel_id={kernel_id} kernelspec=physics\.python .* jobid={jobid} node=c1", line)
    for text in (log, audit.read_text()):
        assert "se' + 'cret" not in text
        assert "secret-output" not in text
        assert gateway.tokens["alice"] not in text
        assert "\n2026 plan" not in text

    for sample in (
        'gateway_slurm_queue_seconds_count{outcome="started",project="physics"} 1.0',
        'gateway_slurm_start_seconds_count{outcome="started",project="physics"} 1.0',
        'gateway_slurm_refusals_total{outcome="over_limit"} 2.0',
        'gateway_slurm_refusals_total{outcome="unknown_kernelspec"} 1.0',
        "gateway_slurm_refused_logins_total 30.0",
        "gateway_slurm_lost_links_total 0.0",
        "gateway_slurm_store_trouble 0.0",
        'gateway_slurm_user_kernels{user="alice"} 1.0',
        'gateway_slurm_held_bytes{kind="held"} 0.0',
        "gateway_slurm_held_limit_bytes 1.073741824e+09",
        'gateway_slurm_held_refusals_total{kind="to_kernel"} 0.0',
    ):
        assert sample in metrics


async def test_a_start_that_fails_and_a_job_that_is_cancelled_say_why(gateway, cluster):
    """The audit log goes on in a new file after a rotation; each action of an admin or a service has their name."""
    alice, audit = gateway.of("alice"), gateway.log.parent / "audit.jsonl"
    moved = audit.with_suffix(f".{uuid.uuid4().hex[:4]}")
    audit.rename(moved)
    with all_nodes_taken(cluster):
        kernel_id = (await alice.json("POST", "/api/kernels", {"name": "physics.python"}))["id"]
        assert await poll_async(lambda: has("allocation_submitted", audit), timeout=READY)
        await stop(alice, kernel_id)
    carol, for_alice = gateway.of("carol"), {"name": "physics.python", "env": {"KERNEL_USERNAME": "alice"}}
    kernel_id = (await gateway.of("portal").json("POST", "/api/kernels", for_alice))["id"]
    await ask(alice, kernel_id, "1")
    jobid = (await alice.json("GET", f"/api/kernels/{kernel_id}"))["slurm"]["jobid"]
    for action in (f"kernels/{kernel_id}/interrupt", f"allocations/{jobid}/keep"):
        assert await carol.status("POST", f"/api/{action}") == 204
    assert await carol.status("DELETE", f"/api/allocations/{jobid}") == 204
    assert await poll_async(lambda: has("allocation_ended", audit), timeout=READY)
    await stop(alice, kernel_id)
    events = events_in(audit)
    assert audit.stat().st_mode & 0o777 == 0o600
    (failed,) = [event for event in events if event["event"] == "kernel_not_started"]
    assert (failed["user"], failed["outcome"], "start_seconds" in failed) == ("alice", "cancelled", False)
    (ended,) = [event for event in events if event["event"] == "allocation_ended"]
    assert (ended["user"], ended["jobid"], ended["state"]) == ("alice", jobid, "CANCELLED")
    assert any(event["event"] == "kernel_ended" and event["jobid"] == jobid for event in events)
    assert [
        (event["event"], event["user"], event["by"]) for event in events if event.get("by", "alice") != "alice"
    ] == [
        ("kernel_requested", "alice", "portal"),
        ("kernel_started", "alice", "portal"),
        ("kernel_interrupt", "alice", "carol"),
        ("allocation_kept", "alice", "carol"),
        ("allocation_cancelled", "alice", "carol"),
    ]
