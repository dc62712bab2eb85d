"""Names for jobs and log files, made from an admin's template and from text of users.

Slurm takes any bytes as a job's name. A name is read by other users in squeue, by the site's scripts and by its
accounting database. So it has only letters, digits, combining marks and a few signs, and a bounded length.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Mapping
from typing import Final

MAX_NAME_BYTES: Final = 128
"""Bytes in UTF-8: slurmdbd's tables have 255 for a job's name, and a file's name has 255 (NAME_MAX)."""
MAX_TEMPLATE: Final = 200
"""Characters."""
PLACEHOLDERS: Final = ("notebook", "kernelspec", "project", "user")
_SIGNS: Final = "._-+@=:"
# Letters, combining marks, numbers (Unicode's general categories).
_KINDS: Final = "LMN"


def clean_name(text: str) -> str:
    """Return ``text`` as a name: every other character is ``_``, a leading ``-`` or ``.`` is removed, the end is cut.

    Characters beyond Unicode's first plane are replaced, too: older tables of slurmdbd cannot hold them.
    """
    # Longer text is cut first: a client chooses it.
    composed = unicodedata.normalize("NFC", text[: 4 * MAX_NAME_BYTES])
    cleaned = "".join(character if _is_allowed(character) else "_" for character in composed).lstrip("-.")
    # A character that the cut would split is left out.
    return cleaned.encode()[:MAX_NAME_BYTES].decode(errors="ignore")


def _is_allowed(character: str) -> bool:
    return character in _SIGNS or (character <= "\uffff" and unicodedata.category(character)[0] in _KINDS)


def file_of(session_name: str) -> str:
    """Return the file's name in JPY_SESSION_NAME, a notebook's path as its server writes paths; cleaned."""
    return clean_name(re.split(r"[/\\]", session_name[-4096:])[-1])


def check_template(template: str) -> str:
    """Return a template for jobs' names. Raises ValueError, which says what is allowed."""
    allowed = f"text with {', '.join('{' + name + '}' for name in PLACEHOLDERS)}, at most {MAX_TEMPLATE} characters"
    if not template.strip() or len(template) > MAX_TEMPLATE:
        raise ValueError(allowed)
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:  # a lone brace
        raise ValueError(f"{allowed} ({error})") from error
    for _text, name, spec, conversion in parts:
        if name is not None and (name not in PLACEHOLDERS or spec or conversion):
            raise ValueError(f"{allowed}; {{{name}}} is not one of them")
    return template


def job_name(template: str, values: Mapping[str, str], default: str) -> str:
    """Fill a valid template with ``values``, cleaned; ``default`` is the name if nothing is left."""
    return clean_name(template.format_map({name: clean_name(values.get(name, "")) for name in PLACEHOLDERS})) or default


# -- Log files on the nodes --

_KERNEL_LOG: Final = re.compile(
    r"kernel-([0-9]{1,10})-(?:([0-9a-f-]{36})(?:-(.*))?|(.*))\.log(?:\.1)?", re.ASCII | re.S
)
_LAUNCHER_LOG: Final = re.compile(r"launcher-([0-9]{1,10})\.log", re.ASCII)


def kernel_log(jobid: str, kernel_id: str, session_name: str) -> str:
    """Return the name of a kernel's log: it has the job, the kernel and the notebook."""
    return "-".join(["kernel", jobid, clean_name(kernel_id), *filter(None, [file_of(session_name)])]) + ".log"


def launcher_log(jobid: str) -> str:
    """Return the name of the log that a job's launchers share (``script.job_script``)."""
    return f"launcher-{jobid}.log"


def parse_log(name: str) -> tuple[str, str, str] | None:
    """Return a log's job, kernel and notebook, of which a launcher's has none; None for any other file's name."""
    if launcher := _LAUNCHER_LOG.fullmatch(name):
        return launcher[1], "", ""
    kernel = _KERNEL_LOG.fullmatch(name)
    return None if kernel is None else (kernel[1], kernel[2] or kernel[4], kernel[3] or "")
