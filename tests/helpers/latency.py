"""``python latency.py PORT``: repeat ``GET /api`` until stdin ends; print the seconds of each."""

from __future__ import annotations

import http.client
import json
import select
import sys
import time


def main() -> None:
    """Repeat the request over one connection, as a monitoring system does."""
    connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=60)
    seconds = []
    while not select.select([sys.stdin], [], [], 0.02)[0]:
        began = time.perf_counter()
        connection.request("GET", "/api")
        connection.getresponse().read()
        seconds.append(time.perf_counter() - began)
    sys.stdout.write(json.dumps(seconds))


if __name__ == "__main__":
    main()
