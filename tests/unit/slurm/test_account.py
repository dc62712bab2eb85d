"""The site's account hook."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_slurm.errors import RequestError, SlurmNotInstalled
from gateway_slurm.slurm.account import Account, parse_exports, resolve_account
from gateway_slurm.slurm.runner import Runner

HOOK = ["sh", "-c", 'echo "export PROJECT=$1;"; echo "export BUDGET_ACCOUNTS=acc-$1;"', "hook", "{project}"]


async def test_no_hook() -> None:
    """Without a hook the project is the account, and nothing is run."""
    runner = Runner()
    assert await resolve_account("p1", [], runner) == Account("p1")
    assert not runner.counts


async def test_hook() -> None:
    """The hook's account is used, and all its variables are kept."""
    account = await resolve_account("p1", HOOK, Runner())
    assert account == Account("acc-p1", {"PROJECT": "p1", "BUDGET_ACCOUNTS": "acc-p1"})
    assert (await resolve_account("p1", HOOK, Runner(), variable="PROJECT")).account == "p1"


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo 'you are no member of p1' >&2; exit 1", "you are no member of p1"),
        ("echo 'export OTHER=1;'", "BUDGET_ACCOUNTS"),
        ("echo 'export BUDGET_ACCOUNTS=;'", "BUDGET_ACCOUNTS"),
        ("echo 'export BUDGET_ACCOUNTS=--wrap=id;'", "BUDGET_ACCOUNTS"),
    ],
)
async def test_hook_refuses(script: str, words: str) -> None:
    """A hook that fails or names no account is an error in the request, in the hook's words."""
    with pytest.raises(RequestError, match=words) as caught:
        await resolve_account("p1", ["sh", "-c", script], Runner())
    assert caught.value.field == "project"


async def test_hook_is_missing() -> None:
    """A missing hook is not the user's fault."""
    with pytest.raises(SlurmNotInstalled):
        await resolve_account("p1", ["/nonexistent/hook"], Runner())


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("export A=b;", {"A": "b"}), ("export A=b", {"A": "b"}), ("export A='b c;d';", {"A": "b c;d"}),
        ('export A="x y";', {"A": "x y"}), ("export A=;", {"A": ""}), ("export A=$(id);", {"A": "$(id)"}),
        ("A=b", {}), ("export A=b; rm -rf /", {}), ("export A='b;", {}), ("export 1A=b;", {}),
        ("unset A;", {}),
        ("export A=/p/a:/p/b;\r", {"A": "/p/a:/p/b"}), ("export A=a=b#c;", {"A": "a=b#c"}),
    ],
)  # fmt: skip
def test_exports(line: str, found: dict[str, str]) -> None:
    """Quotes are read as a shell reads them, nothing is run, and other lines are ignored."""
    assert parse_exports(f"hello\n{line}\n") == found


@given(st.text())
def test_exports_never_fail(text: str) -> None:
    """Any output of a hook can be read."""
    assert all(name.isidentifier() for name in parse_exports(text))


@given(st.text(st.characters(codec="utf-8", exclude_characters="'\n\0\r")))
def test_quoted_values_round_trip(value: str) -> None:
    """A quoted value comes back unchanged."""
    assert parse_exports(f"export A='{value}';") == {"A": value}
