"""The launcher's event loop: sockets, pipes, timers and signals in one thread.

It is not asyncio, whose import would add 30 ms to every new allocation, and of which the launcher needs a tenth.
"""

from __future__ import annotations

import heapq
import itertools
import os
import selectors
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

Callback = Callable[[], None]

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


class Timer:
    """A callback that runs once, at ``when`` (seconds of the monotonic clock)."""

    def __init__(self, when: float, callback: Callback) -> None:
        self.when = when
        self.callback = callback
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class Backoff:
    """Seconds between attempts: each wait is twice the one before, up to ``longest``."""

    def __init__(self, first: float, longest: float) -> None:
        self._first, self.longest = first, longest
        self._wait = first

    def next(self) -> float:
        """The wait before the next attempt."""
        wait, self._wait = self._wait, min(2 * self._wait, self.longest)
        return wait

    def reset(self) -> None:
        """An attempt succeeded: the next wait is the first one again."""
        self._wait = self._first


class Reactor:
    """Runs callbacks one at a time. An exception in a callback is printed, and the others go on."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._signals: dict[int, Callback] = {}
        self._running = True
        # Called before each wait, so that what the callbacks of one round queued is sent together. True: there
        # is more to do at once, after what is ready by then.
        self.before_wait: Callable[[], bool] = lambda: False
        self._wake_read, self._wake_write = os.pipe()
        for fd in (self._wake_read, self._wake_write):
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        self.watch(self._wake_read, READ, lambda _events: self._on_wakeup())

    def watch(self, fileobj: Any, events: int, callback: Callable[[int], None]) -> None:
        """Call ``callback(ready events)`` while any of ``events`` is ready; 0 stops watching."""
        known = fileobj in self._selector.get_map()
        if not events:
            if known:
                self._selector.unregister(fileobj)
        elif known:
            self._selector.modify(fileobj, events, callback)
        else:
            self._selector.register(fileobj, events, callback)

    def forget(self, fileobj: Any) -> None:
        self.watch(fileobj, 0, lambda _events: None)

    def later(self, seconds: float, callback: Callback) -> Timer:
        """Call ``callback`` once, ``seconds`` from now, unless the timer is cancelled."""
        timer = Timer(time.monotonic() + seconds, callback)
        heapq.heappush(self._timers, (timer.when, next(self._order), timer))
        return timer

    def on_signal(self, signum: int, callback: Callback) -> None:
        """Call ``callback`` when the signal comes, from the loop and not from the signal handler.

        Of signals that came together, the one whose callback was registered first is handled first.
        """
        self._signals[signum] = callback
        # A Python handler has to exist for set_wakeup_fd to report the signal.
        signal.signal(signum, lambda _signum, _stack: None)

    def stop(self) -> None:
        self._running = False

    def run(self) -> None:
        while self._running:
            self.run_once()

    def run_once(self) -> None:
        """Wait for events and due timers, and call their callbacks."""
        wait = 0.0 if self._call(self.before_wait) else None
        if wait is None and self._timers:
            wait = max(0.0, self._timers[0][0] - time.monotonic())
        for key, events in self._selector.select(wait):
            # An earlier callback of this round may have closed this file, or opened another one with the same number.
            known = self._selector.get_map().get(key.fd)
            if known is not None and known.fileobj is key.fileobj:
                self._call(key.data, events)
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            timer = heapq.heappop(self._timers)[2]
            if not timer.cancelled:
                self._call(timer.callback)

    def _on_wakeup(self) -> None:
        try:
            signums = os.read(self._wake_read, 4096)
        except BlockingIOError:
            return
        for signum, callback in list(self._signals.items()):
            if signum in signums:
                self._call(callback)

    @staticmethod
    def _call(callback: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return callback(*arguments)
        except Exception:  # noqa: BLE001 - a fault of one kernel or stream must not end the others; the log has it
            traceback.print_exc(file=sys.stderr)
            return None
