"""Before the time limit the gateway shows a warning under the cell that runs, whatever kernel it is."""

from __future__ import annotations

import asyncio
import re
import sys

from helpers.gateway_process import running_gateway, start, stop
from helpers.kernel_clients import IPYKERNEL, READY, install_kernelspec, write_admin_settings
from helpers.notebook_server import Frontend

WARNING = r"\ngateway_slurm: job \d+ reaches its time limit in \d+ seconds, at \d\d:\d\d \S+: save your work\n"
CURVE = {"metadata": {"supported_encryption": ["curve"]}}
SLEEP = "import time; print('be' + 'gun', flush=True); time.sleep(40)"
BASH = {"kernel_argv": [sys.executable, "-m", "bash_kernel", "-f", "{connection_file}"]}
KERNELS = {
    "tunnel": ({"kernel_argv": IPYKERNEL}, {}, SLEEP),
    "direct": ({"kernel_argv": IPYKERNEL, "connect": "direct"}, CURVE, SLEEP),
    "bash": (BASH, {"language": "bash"}, "echo be''gun; sleep 40"),
}


async def warnings_until(frontend, seen):
    """The warnings that came, with their parents, until there are ``seen`` of them."""
    found = []
    while len(found) < seen:
        message = await frontend.receive()
        if message["msg_type"] == "stream" and re.fullmatch(WARNING, message["content"]["text"]):
            assert message["content"]["name"] == "stderr"
            found.append(message["parent_header"]["msg_id"])
    return found


async def warned(gateway, kernelspecs, name):
    """A kernel whose cell runs into the warning, and a session that connects while the cell runs."""
    config, spec, code = KERNELS[name]
    install_kernelspec(kernelspecs, f"warned-{name}", config_overrides={"runtime": 1, **config}, spec_overrides=spec)
    alice = gateway.of("alice")
    kernel_id = await start(alice, f"warned-{name}")
    frontend = await Frontend.connect(alice, kernel_id)
    cell = await frontend.begin(code, "begun")
    late = await Frontend.connect(alice, kernel_id)
    assert await asyncio.wait_for(warnings_until(frontend, 1), 60 + READY) == [cell]
    assert await asyncio.wait_for(warnings_until(late, 1), READY) == [cell]
    # Nothing of the kernel itself repeats it.
    await alice.request("POST", f"/api/kernels/{kernel_id}/interrupt")
    _reply, printed = await frontend.result(cell)
    assert "time limit" not in printed
    await stop(alice, kernel_id)


async def test_every_kernel_shows_the_warning_once(gateway_environment, kernelspecs, tmp_path):
    """ipykernel behind the tunnel and dialled, and a kernel that captures nothing; sessions that came later, too."""
    settings = write_admin_settings(walltime_warnings=[0.6])
    try:
        with running_gateway(tmp_path / "gateway") as gateway:
            await asyncio.gather(*(warned(gateway, kernelspecs, name) for name in KERNELS))
    finally:
        settings.unlink()
