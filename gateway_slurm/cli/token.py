"""``jupyter slurm token``: the tokens by which the shared gateway knows its users."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path

from gateway_slurm.errors import RequestError
from gateway_slurm.gateway.auth.tokens import TokenFile, TokenRecord

COLUMNS = ("ID", "USER", "KIND", "MADE", "EXPIRES")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = subparsers.add_parser("token", help="make, list and remove tokens for the shared gateway")
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    add = actions.add_parser("add", help="make a token and print it, once", description="Make a token and print it.")
    add.set_defaults(run=_add)
    add.add_argument("user", metavar="USER", help="whose it is to be")
    add.add_argument("--service", action="store_true", help="a server for many users, which says for whom it asks")
    add.add_argument("--admin", action="store_true", help="may see and end everybody's kernels")
    add.add_argument("--days", type=_days, help="days after which it expires (default: never)")
    show = actions.add_parser("list", help="list them (not the tokens themselves, which are nowhere)")
    show.set_defaults(run=_list)
    show.add_argument("--json", action="store_true", help="for programs")
    remove = actions.add_parser("remove", help="take one back, or all of a user's")
    remove.set_defaults(run=_remove)
    which = remove.add_mutually_exclusive_group(required=True)
    which.add_argument("id", metavar="ID", nargs="?", help="as listed; also what follows gws_ in the token")
    which.add_argument("--user", help="all tokens of this user")
    for action in (add, show, remove):
        action.add_argument("--tokens", type=Path, required=True, metavar="FILE", help="the gateway's tokens_file")


def _days(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (days := float(text)) <= 36500:
            return days
    raise argparse.ArgumentTypeError("must be a number of days above 0, at most 36500")


def _add(arguments: argparse.Namespace) -> int:
    token = TokenFile(arguments.tokens).add(
        arguments.user, service=arguments.service, admin=arguments.admin, days=arguments.days
    )
    print(token)
    print(f"This is {arguments.user}'s token. It is shown once; {arguments.tokens} holds a hash only.", file=sys.stderr)
    return 0


def _list(arguments: argparse.Namespace) -> int:
    records = TokenFile(arguments.tokens).records()
    if arguments.json:
        print(json.dumps([_row(record) for record in records], indent=1))
        return 0
    if not records:
        print(f"There are no tokens in {arguments.tokens}.")
        return 0
    rows = [COLUMNS, *map(_cells, records)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _row(record: TokenRecord) -> dict[str, object]:
    return {name: getattr(record, name) for name in ("id", "user", "service", "admin", "created", "expires")}


def _cells(record: TokenRecord) -> tuple[str, ...]:
    kind = ", ".join(word for word in ("service", "admin") if getattr(record, word)) or "user"
    expires = "never" if record.expires is None else _day(record.expires)
    return record.id, record.user, kind, _day(record.created), expires + (" (over)" if record.is_expired else "")


def _day(seconds: int) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(seconds))


def _remove(arguments: argparse.Namespace) -> int:
    identity: str | None = arguments.id
    user: str | None = arguments.user

    def unwanted(record: TokenRecord) -> bool:
        return record.user == user if user is not None else record.id == identity

    removed = TokenFile(arguments.tokens).remove(unwanted)
    if not removed:
        what = f"of the user {user!r}" if user is not None else f"with the id {identity!r}"
        raise RequestError(f"there is no token {what[:200]} in {arguments.tokens}; see: jupyter slurm token list")
    for record in removed:
        print(f"token {record.id} of {record.user} is removed")
    return 0
