"""A program that plays the gateway, to be run as its account: kernels of many owners by one service.

Reads one JSON object a line, ``{"do": NAME, "number": N, …}``, and answers each with one, in whatever order:
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


class Gateway:
    """Its methods are what can be asked for."""

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
        """What the code printed; an error's name and value where it raised."""
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
        """How often each of Slurm's commands was run."""
        return dict(SlurmService.instance().runner.counts)

    async def tokens(self) -> list[str]:
        """Every launch token that was made."""
        return self.seen


def note_tokens(gateway: Gateway) -> None:
    """Let the gateway tell its tokens: what must be seen nowhere has to be known to the test."""
    expect = ResponseSocket.expect

    def expecting(self: ResponseSocket, launcher_id: str, tokens: Sequence[bytes], handler: Any) -> Any:
        gateway.seen += [token.hex() for token in tokens]
        return expect(self, launcher_id, tokens, handler)

    ResponseSocket.expect = expecting  # type: ignore[method-assign]


async def answer(gateway: Gateway, *, do: str, number: int, **what: Any) -> None:
    """Do one thing and print what came of it."""
    told: dict[str, Any] = {"number": number}
    try:
        told["answer"] = await getattr(gateway, do)(**what)
    except Exception as error:  # noqa: BLE001 - the test judges it
        told.update(error=type(error).__name__, message=str(error))
    print(json.dumps(told), flush=True)  # noqa: T201 - it is the answer


async def main() -> None:
    """Answer until standard input ends."""
    gateway = Gateway()
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
