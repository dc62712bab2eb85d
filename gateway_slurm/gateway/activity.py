"""What a kernel does, read from its iopub: whether it is busy, and when it last was.

As jupyter_server reads it, but as fast as the kernel publishes and within the bounds of our sockets: a status
that is missed would leave a kernel busy for ever, and its allocation with it.
"""

from __future__ import annotations

from typing import Any

from jupyter_server._tz import utcnow

from gateway_slurm.gateway import messages
from gateway_slurm.gateway.delivery import Delivery
from gateway_slurm.gateway.sockets import KernelSocket


class Activity(KernelSocket):
    """Keeps a kernel's ``execution_state`` and ``last_activity``; ``manager`` is the mapping kernel manager.

    ``delivery`` hears of what is published while there is no frontend, and of the state.
    """

    def __init__(self, manager: Any, kernel: Any, delivery: Delivery | None = None) -> None:
        self._manager, self._kernel, self._delivery = manager, kernel, delivery
        kernel.reason, kernel.last_activity = "", utcnow()
        super().__init__(kernel, "iopub", b"", self._heard)

    def _heard(self, frames: list[bytes]) -> None:
        parts = messages.parts_of(frames)
        kernel, tracks = self._kernel, self._manager.track_message_type
        msg_type, asked_by = messages.header_of(parts).get("msg_type"), messages.parent_header_of(parts).get("msg_type")
        if tracks(msg_type) or tracks(asked_by) or kernel.execution_state == "busy":
            self._manager.last_kernel_activity = kernel.last_activity = utcnow()
        if self._delivery is not None:
            self._delivery.unwanted(messages.id_of(parts))
        if msg_type != "status":
            return
        state = str(messages.content_of(parts).get("execution_state", ""))
        if tracks(asked_by):
            kernel.execution_state = state
            if self._delivery is not None:
                self._delivery.state(state)
        elif kernel.execution_state in ("starting", "unknown") and state != "starting":
            kernel.execution_state = "idle"  # whatever it says of a request that does not count
