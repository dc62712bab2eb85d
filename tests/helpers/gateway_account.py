"""A program that acts as the gateway under the gateway's account: one service with kernels of many owners.

It reads a JSON object from each line, ``{"do": NAME, "number": N, …}``, and answers each with an object, in any order:
``{"number": N, "answer": …}`` or ``{"number": N, "error": CLASS, "message": TEXT}``.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from typing import Any

from jupyter_client import AsyncKernelManager

from gateway_slurm.link.server import ResponseSocket
from gateway_slurm.service import SlurmService

READY = 60
LONG_CELL = "import time; print('begun', flush=True); time.sleep(600)"


class GatewayAccount:
    """Its methods are the commands."""

    def __init__(self) -> None:
        self.kernels: dict[str, tuple[AsyncKernelManager, Any]] = {}
        self.seen: list[str] = []

    async def start(self, kernel: str, owner: str, fields: dict[str, Any] | None = None) -> dict[str, Any]:
        manager = AsyncKernelManager(kernel_name="slurm")
        await manager.start_kernel(slurm_owner=owner, slurm_fields=fields or {})
        client = manager.client()
        client.start_channels()
        self.kernels[kernel] = manager, client
        await client.wait_for_ready(timeout=READY)
        return {"jobid": manager.provisioner.jobid, "kernel_id": manager.provisioner.kernel_id}

    async def execute(self, kernel: str, code: str) -> str:
        """Run code; return its output, or the name and value of its error."""
        _manager, client = self.kernels[kernel]
        printed: list[str] = []

        def hook(message: dict[str, Any]) -> None:
            if message["msg_type"] == "stream":
                printed.append(message["content"]["text"])

        reply = (await client.execute_interactive(code, timeout=READY, output_hook=hook))["content"]
        if reply["status"] != "ok":
            return f"{reply['ename']}: {reply['evalue']}"
        return "".join(printed).strip()

    async def interrupt(self, kernel: str) -> str:
        """Interrupt a long cell; return how it ended."""
        manager, client = self.kernels[kernel]
        begun = asyncio.Event()

        def hook(message: dict[str, Any]) -> None:
            if message["msg_type"] == "stream":
                begun.set()

        cell = asyncio.ensure_future(client.execute_interactive(LONG_CELL, timeout=READY, output_hook=hook))
        await asyncio.wait_for(begun.wait(), READY)
        await manager.interrupt_kernel()
        return str((await cell)["content"]["ename"])

    async def restart(self, kernel: str) -> str:
        manager, client = self.kernels[kernel]
        await manager.restart_kernel()
        await client.wait_for_ready(timeout=READY)
        return str(manager.provisioner.jobid)

    async def shutdown(self, kernel: str) -> None:
        manager, client = self.kernels.pop(kernel)
        client.stop_channels()
        await manager.shutdown_kernel()

    async def rows(self, owner: str | None) -> list[dict[str, Any]]:
        return SlurmService.instance().allocations_of(owner)

    async def cancel(self, owner: str | None, jobid: str) -> None:
        service = SlurmService.instance()
        await service.run(service.cancel_allocation(owner, jobid))

    async def commands(self) -> dict[str, int]:
        """How often each Slurm command was run."""
        return dict(SlurmService.instance().runner.counts)

    async def tokens(self) -> list[str]:
        """All launch tokens that were made."""
        return self.seen


def note_tokens(gateway: GatewayAccount) -> None:
    """Record launch tokens, so that the test can check that no token is visible anywhere."""
    expect = ResponseSocket.expect

    def expecting(self: ResponseSocket, launcher_id: str, tokens: Sequence[bytes], *others: Any, **named: Any) -> Any:
        gateway.seen += [token.hex() for token in tokens]
        return expect(self, launcher_id, tokens, *others, **named)

    ResponseSocket.expect = expecting  # type: ignore[method-assign]


async def answer(gateway: GatewayAccount, *, do: str, number: int, **what: Any) -> None:
    """Run a command and print its result."""
    result: dict[str, Any] = {"number": number}
    try:
        result["answer"] = await getattr(gateway, do)(**what)
    except Exception as error:  # noqa: BLE001 - the test judges it
        result.update(error=type(error).__name__, message=str(error))
    print(json.dumps(result), flush=True)  # noqa: T201 - it is the answer


async def main() -> None:
    """Answer commands until standard input ends."""
    gateway = GatewayAccount()
    note_tokens(gateway)
    tasks = set()
    while line := await asyncio.to_thread(sys.stdin.readline):
        task = asyncio.ensure_future(answer(gateway, **json.loads(line)))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    for kernel in list(gateway.kernels):
        await gateway.shutdown(kernel)
    SlurmService.instance().close()


if __name__ == "__main__":
    asyncio.run(main())
