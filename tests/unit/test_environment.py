"""The environment variables of the server that a kernel inherits."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_slurm.environment import DROPPED, kernel_environment
from gateway_slurm.errors import RequestError


@pytest.mark.parametrize("name", [name.replace("*", "X") for name, _ in DROPPED])
def test_dropped(name: str) -> None:
    """No variable of the table is inherited, even if the admin's list allows it."""
    assert kernel_environment({name: "secret"}) == {}
    assert kernel_environment({name: "secret"}, allowed=["*"]) == {}


def test_kept() -> None:
    """The user's variables are inherited, including bash's functions."""
    ambient = {
        "PATH": "/bin",
        "LANG": "C",
        "BASH_FUNC_module%%": "() { :; }",
        "KERNEL_ID": "1",
        "SLURMY": "x",
    }
    assert kernel_environment(ambient) == ambient


def test_allowed() -> None:
    """An allow-list admits its names and patterns, and nothing else."""
    ambient = {"PATH": "/bin", "LC_ALL": "C", "LC_CTYPE": "C", "HOME": "/h"}
    assert kernel_environment(ambient, allowed=["LC_*", "HOME"]) == {
        "LC_ALL": "C",
        "LC_CTYPE": "C",
        "HOME": "/h",
    }
    assert kernel_environment(ambient, allowed=[]) == {}


@pytest.mark.parametrize("name", ["", "A=B", "A\0"])
def test_impossible_names(name: str) -> None:
    """Names that no process can have are left out."""
    assert kernel_environment({name: "x"}) == {}


def test_nul_names_the_variable() -> None:
    """A NUL in a value is an error that names the variable and does not show the value."""
    with pytest.raises(RequestError, match="'SECRET'") as caught:
        kernel_environment({"SECRET": "hunter2\0"})
    assert "hunter2" not in str(caught.value)


def test_bounds() -> None:
    """Each variable is bounded, and so is the whole environment."""
    with pytest.raises(RequestError, match="'BIG'"):
        kernel_environment({"BIG": "x" * (128 << 10)})
    with pytest.raises(RequestError, match="1048576"):
        kernel_environment({f"V{number}": "x" * 100_000 for number in range(11)})


@given(st.dictionaries(st.text(st.characters(codec="utf-8")), st.text(st.characters(codec="utf-8"))))
def test_only_takes_away(ambient: dict[str, str]) -> None:
    """Filtering only removes variables, and the only error is RequestError."""
    try:
        kept = kernel_environment(ambient)
    except RequestError:
        return
    assert kept.items() <= ambient.items()
    assert kernel_environment(kept) == kept


def test_table() -> None:
    """Every row of the documentation's table has its reason."""
    page = (Path(__file__).parents[2] / "docs" / "users" / "kernelspec.md").read_text()
    assert all(f"| `{name}` | {reason} |" in page for name, reason in DROPPED)
    assert all(reason for _, reason in DROPPED)
