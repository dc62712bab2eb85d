"""What Slurm's job states mean."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gateway_slurm.slurm.formats import STATES, Meaning, meaning


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("PENDING", Meaning.WAITING), ("pending", Meaning.WAITING), ("PD", Meaning.WAITING),
        ("REQUEUE_HOLD", Meaning.HELD), ("RUNNING", Meaning.USABLE), (" RUNNING \n", Meaning.USABLE),
        ("R", Meaning.USABLE), ("SUSPENDED", Meaning.PAUSED), ("COMPLETING", Meaning.ENDING),
        ("CANCELLED by 1000", Meaning.OVER), ("CANCELLED+", Meaning.OVER), ("OUT_OF_MEMORY", Meaning.OVER),
        ("NODE_FAIL", Meaning.OVER), ("", Meaning.UNKNOWN), ("VAPORIZED", Meaning.UNKNOWN),
        ("COMPLETEDISH", Meaning.UNKNOWN),
    ],
)  # fmt: skip
def test_meaning(text: str, expected: Meaning) -> None:
    """The state's word decides, in any case and with the suffixes of squeue and sacct."""
    assert meaning(text) is expected


@given(st.text(max_size=20), st.text(max_size=20))
def test_an_unknown_state_is_never_over(word: str, rest: str) -> None:
    """A word that is neither a state nor a code is UNKNOWN, with any text after it."""
    assume(not word.split() or meaning(word.split()[0]) is Meaning.UNKNOWN)
    assert meaning(f"{word} {rest}" if word.split() else word) is Meaning.UNKNOWN


@given(st.text(min_size=3))
def test_only_the_states_own_names_are_over(text: str) -> None:
    """A text longer than any code is final only if its first word is a final state's name."""
    if meaning(text) is Meaning.OVER:
        word = text.upper().split()[0].rstrip("+")
        assert STATES.get(word) is Meaning.OVER or len(word) <= 2


def test_table() -> None:
    """The documentation's table has every state."""
    page = (Path(__file__).parents[3] / "docs" / "developers" / "states.md").read_text()
    assert all(f"| `{name}` |" in page for name in STATES)
