"""The job script: a few lines of POSIX sh, then the launcher's source.

The script contains the program, so the nodes need no shared file system and no installation of this package. Python
reads the program from standard input in isolated mode (``-I``), so neither the working directory nor PYTHONPATH can
replace a module.

Slurm may send SIGUSR1 at any time. The script ignores it until the program handles it: an ignored signal stays ignored
across exec.
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
[ -d "${{HOME:-}}" ] || HOME=$(getent passwd "$(id -u)" | cut -d: -f6)
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

    ``log_dir`` may begin with ``~/``, which is the home directory *on the node*. The output of the script and of the
    program goes to ``launcher-$SLURM_JOB_ID.log`` in that directory (0600 in a 0700 directory), or is discarded if the
    file cannot be written. The script exits with 127 if the node has none of the Pythons.

    Raises ValueError for a NUL, which a shell script cannot contain, and for an empty ``pythons``.
    """
    if not pythons:
        raise ValueError("job_script() needs the name of at least one Python")
    if any("\0" in text for text in (program, log_dir, *pythons, *arguments)):
        raise ValueError("a job script cannot contain a NUL character")
    return _TEMPLATE.format(
        log_dir=_quote_home(log_dir),
        pythons=" ".join(_quote_home(python) for python in pythons),
        arguments=" ".join(map(shlex.quote, arguments)),
        marker=_marker(program),
        program=program.removesuffix("\n"),
    )


def _quote_home(path: str) -> str:
    """Quote ``path`` for sh; the node expands a leading ``~/``."""
    if path.startswith("~/"):
        return '"${HOME:-/nonexistent}"/' + shlex.quote(path[2:])
    return shlex.quote(path)


def _marker(program: str) -> str:
    """Return a delimiter for the here-document that is not a line of ``program``."""
    lines = set(program.split("\n"))
    marker = "PROGRAM_" + hashlib.sha256(program.encode(errors="surrogatepass")).hexdigest()[:16]
    while marker in lines:  # only in a program that was made for this
        marker += "_"
    return marker
