"""``jupyter slurm token``: the tokens by which the shared gateway recognises its users."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path

from gateway_slurm.cli.common import print_table
from gateway_slurm.errors import RequestError
from gateway_slurm.gateway.auth.tokens import TokenFile, TokenRecord

COLUMNS = ("ID", "USER", "KIND", "MADE", "EXPIRES")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = subparsers.add_parser("token", help="make, list and remove tokens for the shared gateway")
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    add = actions.add_parser("add", help="make a token and print it once", description="Make a token and print it.")
    add.set_defaults(run=_add)
    add.add_argument("user", metavar="USER", help="the user whom the token identifies")
    add.add_argument(
        "--service", action="store_true", help="for a server that acts for many users and names one in each request"
    )
    add.add_argument("--admin", action="store_true", help="may see and end the kernels of all users")
    add.add_argument("--days", type=_days, help="days until it expires (default: it does not)")
    listing = actions.add_parser("list", help="list tokens by id (the file holds hashes, not the tokens)")
    listing.set_defaults(run=_list)
    listing.add_argument("--json", action="store_true", help="print JSON, for programs")
    remove = actions.add_parser("remove", help="remove a token, or all tokens of a user")
    remove.set_defaults(run=_remove)
    which = remove.add_mutually_exclusive_group(required=True)
    which.add_argument("id", metavar="ID", nargs="?", help="id in the list; it also follows gws_ in the token")
    which.add_argument("--user", help="all tokens of this user")
    for action in (add, listing, remove):
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
    print(
        f"This is {arguments.user}'s token. It is not shown again: {arguments.tokens} holds its hash only.",
        file=sys.stderr,
    )
    return 0


def _list(arguments: argparse.Namespace) -> int:
    records = TokenFile(arguments.tokens).records()
    if arguments.json:
        print(json.dumps([_row(record) for record in records], indent=1))
        return 0
    if not records:
        print(f"There are no tokens in {arguments.tokens}.")
        return 0
    print_table(COLUMNS, [_cells(record) for record in records])
    return 0


def _row(record: TokenRecord) -> dict[str, object]:
    return {name: getattr(record, name) for name in ("id", "user", "service", "admin", "created", "expires")}


def _cells(record: TokenRecord) -> tuple[str, ...]:
    kind = ", ".join(word for word in ("service", "admin") if getattr(record, word)) or "user"
    expires = "never" if record.expires is None else _day(record.expires)
    return record.id, record.user, kind, _day(record.created), expires + (" (expired)" if record.is_expired else "")


def _day(seconds: int) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(seconds))


def _remove(arguments: argparse.Namespace) -> int:
    token_id: str | None = arguments.id
    user: str | None = arguments.user

    def matches(record: TokenRecord) -> bool:
        return record.user == user if user is not None else record.id == token_id

    removed = TokenFile(arguments.tokens).remove(matches)
    if not removed:
        wanted = f"of the user {user!r}" if user is not None else f"with the id {token_id!r}"
        raise RequestError(f"there is no token {wanted[:200]} in {arguments.tokens}; see: jupyter slurm token list")
    for record in removed:
        print(f"token {record.id} of {record.user} is removed")
    return 0
