"""The text that runs on the node: a few lines of POSIX sh, then the launcher's own source.

The program travels in the script, so no shared file system is needed for it, and nothing of ours has to be
installed on a node. Python reads it from standard input in isolated mode (``-I``), so neither the working
directory nor PYTHONPATH can put a module of somebody else's in its way.

SIGUSR1, which Slurm may send at any time, is ignored until the program asks for it: a signal that is ignored stays so
over exec.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Sequence

_TEMPLATE = """\
#!/bin/sh
trap '' USR1
umask 077
log=/dev/null
dir={log_dir}
if [ -d "$dir" ] || mkdir -p -m 700 "$dir" 2>/dev/null; then
  if [ -w "$dir" ]; then log=$dir/launcher-${{SLURM_JOB_ID:-0}}.log; fi
fi
{{ true >>"$log"; }} 2>/dev/null || log=/dev/null
exec >>"$log" 2>&1
for python in {pythons}; do
  if command -v "$python" >/dev/null 2>&1; then
    exec "$python" -I - {arguments} <<'{marker}'
{program}
{marker}
  fi
done
echo "gateway_slurm: none of these is on $(hostname):" {pythons}
exit 127
"""


def job_script(program: str, *, pythons: Sequence[str], log_dir: str, arguments: Sequence[str] = ()) -> str:
    """Return the script that starts ``program`` with the first of ``pythons`` that the node has.

    ``log_dir`` may begin with ``~/``, which is the home directory *on the node*. The script's output, and the
    program's, goes to ``launcher-$SLURM_JOB_ID.log`` there (0600 in a 0700 directory), or nowhere when that
    cannot be written. Exits with 127 when the node has no such Python.

    Raises ValueError for a NUL, which no shell script can carry, and for an empty ``pythons``.
    """
    if not pythons:
        raise ValueError("job_script() needs the name of at least one Python")
    if any("\0" in text for text in (program, log_dir, *pythons, *arguments)):
        raise ValueError("a job script cannot carry a NUL character")
    return _TEMPLATE.format(
        log_dir=_quote_home(log_dir),
        pythons=" ".join(_quote_home(python) for python in pythons),
        arguments=" ".join(map(shlex.quote, arguments)),
        marker=_marker(program),
        program=program.removesuffix("\n"),
    )


def _quote_home(path: str) -> str:
    """Quote ``path`` for sh; only a leading ``~/`` is left for the node to fill in."""
    if path.startswith("~/"):
        return '"${HOME:-/nonexistent}"/' + shlex.quote(path[2:])
    return shlex.quote(path)


def _marker(program: str) -> str:
    """Return a here-document's end that no line of ``program`` is."""
    lines = set(program.split("\n"))
    marker = "PROGRAM_" + hashlib.sha256(program.encode(errors="surrogatepass")).hexdigest()[:16]
    while marker in lines:  # possible only for a program made to hit it, and then once per round
        marker += "_"
    return marker
