"""A user of a real gateway and a real Slurm who loses a right: what is open ends, and what is refused stays so."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gateway_slurm.gateway.auth.tokens import TokenFile
from helpers.gateway_process import Frontend, HTTPClientError, ask, running_gateway, start, stop, write_project
from helpers.kernel_clients import JOB, jupyter_files_in

POLICY_VIOLATION = 1008


@pytest.fixture(scope="module")
def gateway(cluster, jupyter_base):
    """A gateway that looks at open websockets often."""
    options = ["--SlurmGatewayApp.recheck_interval=0.5", "--GatewayKernelSpecManager.membership_age=0.1"]
    options += ["--SlurmMappingKernelManager.max_starts_per_minute=6"]
    with jupyter_files_in(jupyter_base), running_gateway(jupyter_base / "revoked", *options) as running:
        yield running


async def test_websockets_end_with_the_token_and_with_the_membership(gateway):
    """Those of the removed token are closed, and no others; who has left the project can open none."""
    alice, directory = gateway.of("alice"), gateway.log.parent
    tokens = TokenFile(directory / "tokens.json")
    second = tokens.add("alice")
    kernel_id = await start(alice, "physics.python")
    kept, revoked = [await Frontend.connect(server, kernel_id) for server in (alice, replace(alice, token=second))]
    try:
        jobid = await ask(alice, kernel_id, JOB)
        tokens.remove(lambda record: record.id == second.split("_")[1])
        await revoked.until_closed()
        assert revoked.close_code == POLICY_VIOLATION
        assert (await kept.execute("print(3)"))[1] == "3"
        # The project does not allow keep_allocation as a field: nor is it allowed as an action.
        assert await alice.status("POST", f"/api/allocations/{jobid}/keep") == 403
        assert await gateway.of("bob").status("POST", f"/api/allocations/{jobid}/keep") == 404
        write_project(directory / "projects", members={"users": ["bob"]})
        await kept.until_closed()
        assert kept.close_code == POLICY_VIOLATION
        with pytest.raises(HTTPClientError, match="403"):
            await Frontend.connect(alice, kernel_id)
        write_project(directory / "projects")
        assert await ask(alice, kernel_id, "print(4)") == "4"
    finally:
        write_project(directory / "projects")
        kept.close()
        revoked.close()
        await stop(alice, kernel_id)


async def test_a_user_starts_so_many_kernels_a_minute(gateway):
    """Starts that fail count as well; another user's do not."""
    bob, wrong = gateway.of("bob"), {"name": "physics.python", "env": {"KERNEL_SLURM_NODE": "no-such-node"}}
    answers = [await bob.refusal("POST", "/api/kernels", wrong) for _ in range(8)]
    statuses = [status for status, _message in answers]
    assert statuses[-2:] == [429, 429]
    assert 429 not in statuses[:6]
    assert "6 kernels were started for you in the last minute" in answers[-1][1]
    kernel_id = await start(gateway.of("carol"), "physics.python")
    await stop(gateway.of("carol"), kernel_id)
