"""The site's account hook: from a project's name to the account that Slurm bills.

Some sites have a command that prints a project's environment as lines ``export NAME=value;``, the account
in one
of them (``jutil env activate -p PROJECT`` prints BUDGET_ACCOUNTS). The admin names it as an argv; no shell
reads
what it prints.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from gateway_slurm.errors import RequestError
from gateway_slurm.slurm.commands import slurm_words
from gateway_slurm.slurm.runner import Runner

_MAX_TEXT: Final = 1 << 20
_MAX_LINES: Final = 4096
_EXPORT: Final = re.compile(r"\s*export\s+([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.ASCII)


@dataclass(frozen=True)
class Account:
    """The account for ``sbatch --account``, and what else the hook exported for the project."""

    account: str
    environment: dict[str, str] = field(default_factory=dict)


async def resolve_account(
    project: str, command: Sequence[str], runner: Runner, *, variable: str = "BUDGET_ACCOUNTS", user: str = ""
) -> Account:
    """Return the account of ``project``: the name itself if there is no ``command``.

    ``{project}`` and ``{user}`` in the command's items are replaced. Raises RequestError with the command's own
    words when it fails or exports no ``variable``, and SlurmNotInstalled or SlurmUnavailable when it is not there
    or hangs.
    """
    if not command:
        return Account(project)
    argv = [item.replace("{user}", user).replace("{project}", project) for item in command]
    result = await runner.run(argv)
    environment = parse_exports(result.stdout)
    account = environment.get(variable, "").strip()
    if result.exit_status == 0 and account and not account.startswith("-"):
        return Account(account, environment)
    words = slurm_words(result.stderr) or slurm_words(result.stdout) or "it said nothing"
    raise RequestError(
        f"project={project!r}: {argv[0]} gave no account in {variable} "
        f"(status {result.exit_status}): {words[:1000]}. "
        "Check the project's name and that you are a member of it",
        field="project",
    )


def parse_exports(text: str) -> dict[str, str]:
    """Return the variables in lines ``export NAME=value;``; quotes are read as a shell reads them, nothing
    is run.

    Lines that are anything else, or that quote wrongly, are ignored; at most 1 MiB and 4096 lines are read.
    """
    found: dict[str, str] = {}
    for line in text[:_MAX_TEXT].split("\n")[:_MAX_LINES]:
        match = _EXPORT.fullmatch(line.rstrip("\r"))
        if match is None or "\0" in line:
            continue
        try:
            words = shlex.split(match[2].rstrip().removesuffix(";"))
        except ValueError:
            continue
        if len(words) <= 1:  # more words are another command's, or a value that was not quoted
            found[match[1]] = "".join(words)
    return found
