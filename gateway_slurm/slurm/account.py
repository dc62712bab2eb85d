"""The site's account hook, which maps a project to the account that Slurm bills.

Some sites have a command that prints a project's environment as lines ``export NAME=value;``, and one of the variables
is the account (``jutil env activate -p PROJECT`` prints BUDGET_ACCOUNTS). The admin sets this command as an argv. No
shell reads its output.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from gateway_slurm.errors import RequestError
from gateway_slurm.slurm.commands import slurm_message
from gateway_slurm.slurm.runner import Runner

_MAX_TEXT: Final = 1 << 20
_MAX_LINES: Final = 4096
_EXPORT: Final = re.compile(r"\s*export\s+([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.ASCII)


@dataclass(frozen=True)
class Account:
    """The account for ``sbatch --account``, and the other variables that the hook exported for the project."""

    account: str
    environment: dict[str, str] = field(default_factory=dict)


async def resolve_account(
    project: str, command: Sequence[str], runner: Runner, *, variable: str = "BUDGET_ACCOUNTS", user: str = ""
) -> Account:
    """Return the account of ``project``, which is the project's name itself if there is no ``command``.

    ``{project}`` and ``{user}`` in the command's items are replaced. Raises RequestError with the command's own
    words if it fails or exports no ``variable``, SlurmNotInstalled if the command does not exist, and
    SlurmUnavailable if it hangs.
    """
    if not command:
        return Account(project)
    argv = [item.replace("{user}", user).replace("{project}", project) for item in command]
    result = await runner.run(argv)
    environment = parse_exports(result.stdout)
    account = environment.get(variable, "").strip()
    if result.exit_status == 0 and account and not account.startswith("-"):
        return Account(account, environment)
    message = slurm_message(result.stderr) or slurm_message(result.stdout) or "it printed no message"
    raise RequestError(
        f"project={project!r}: {argv[0]} gave no account in {variable} "
        f"(status {result.exit_status}): {message[:1000]}. "
        "Check the project's name and that you are a member of it",
        field="project",
    )


def parse_exports(text: str) -> dict[str, str]:
    """Return the variables in lines ``export NAME=value;``, with quotes read as in a shell; no code is run.

    Other lines, and lines with an open quote, are ignored; at most 1 MiB and 4096 lines are read.
    """
    found: dict[str, str] = {}
    for line in text[:_MAX_TEXT].split("\n")[:_MAX_LINES]:
        match = _EXPORT.fullmatch(line.rstrip("\r"))
        if match is None or "\0" in line:
            continue
        try:
            values = shlex.split(match[2].rstrip().removesuffix(";"))
        except ValueError:
            continue
        if len(values) <= 1:  # more belong to a second command, or to a value without quotes
            found[match[1]] = "".join(values)
    return found
