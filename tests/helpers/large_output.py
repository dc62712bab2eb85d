"""Much output: what prints it, and that all of it came."""

from __future__ import annotations

from helpers.kernel_clients import DROP_NOTHING
from helpers.notebook_server import Frontend

PIECE = 100_000  # characters of one print
PIECES = 3_200
TOTAL = PIECE * PIECES
# Each is a message of its own, as what is not flushed is put together.
FLOOD = f"for number in range({PIECES}): print(f'{{number:06d}}'.ljust({PIECE - 1}, '.'), flush=True)"


async def relay_small_and_large(frontend: Frontend) -> None:
    """10 000 single prints, then 100 MB: all of it comes, in order."""
    _reply, printed = await frontend.execute(f"{DROP_NOTHING}for number in range(10_000): print(number, flush=True)")
    assert printed.split() == [str(number) for number in range(10_000)]
    _reply, printed = await frontend.execute("for number in range(100): print(f'{number:02d}' * 500_000)")
    assert [(line[:2], len(line)) for line in printed.split()] == [(f"{n:02d}", 1_000_000) for n in range(100)]


def numbers_of(text: str) -> list[int]:
    """Which of the flood's pieces are in it, in their order."""
    return [int(line[:6]) for line in text.split()]
