"""Large output: code that prints it, and checks that all of it arrives."""

from __future__ import annotations

from helpers.kernel_clients import DROP_NOTHING
from helpers.notebook_server import Frontend

PIECE = 100_000  # characters of one print
PIECES = 3_200
TOTAL = PIECE * PIECES
# Each print is flushed, since ipykernel joins prints that are not.
FLOOD = f"for number in range({PIECES}): print(f'{{number:06d}}'.ljust({PIECE - 1}, '.'), flush=True)"


async def relay_small_and_large(frontend: Frontend) -> None:
    """Print 10 000 lines, then 100 MB; all output must arrive in order."""
    _reply, printed = await frontend.execute(f"{DROP_NOTHING}for number in range(10_000): print(number, flush=True)")
    assert printed.split() == [str(number) for number in range(10_000)]
    _reply, printed = await frontend.execute("for number in range(100): print(f'{number:02d}' * 500_000)")
    assert [(line[:2], len(line)) for line in printed.split()] == [(f"{n:02d}", 1_000_000) for n in range(100)]


def numbers_of(text: str) -> list[int]:
    """The numbers of the flood's pieces in the text, in order."""
    return [int(line[:6]) for line in text.split()]
