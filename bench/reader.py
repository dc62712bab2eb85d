"""``python -m bench.reader CONNECTION_FILE CODE``: run code and read its output; print a line after 50 MB."""

from __future__ import annotations

import sys
from typing import Any

from jupyter_client.blocking import BlockingKernelClient

ENOUGH = 50_000_000


def main() -> None:
    """Read until the code has ended."""
    client = BlockingKernelClient(connection_file=sys.argv[1])
    client.load_connection_file()
    client.start_channels()
    client.wait_for_ready(timeout=60)
    size = 0
    announced = False

    def count(message: dict[str, Any]) -> None:
        nonlocal size, announced
        size += len(message["content"].get("text", ""))
        if size > ENOUGH and not announced:
            announced = True
            print("flood", flush=True)

    client.execute_interactive(sys.argv[2], output_hook=count, timeout=120)
    client.stop_channels()


if __name__ == "__main__":
    main()
