"""Draw what the documentation takes from the code: ``draw_docs.py [--check] [--root DIR]``.

A page holds drawn blocks between two comments, ``<!-- drawn: NAME -->`` and ``<!-- end: NAME -->``; what is
around them is written by hand. The sample configurations in ``etc/`` are drawn as a whole. With ``--check``
nothing is written, and the exit status is 1 where a file is not what the code says.
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from traitlets import Enum, TraitType
from traitlets.config import Configurable

from gateway_slurm.cli.doctor.steps import steps_table
from gateway_slurm.config import ServiceSettings
from gateway_slurm.environment import dropped_table
from gateway_slurm.gateway.app import SlurmGatewayApp
from gateway_slurm.gateway.auth.identity import GatewayIdentityProvider
from gateway_slurm.gateway.kernel_manager import SlurmMappingKernelManager
from gateway_slurm.gateway.specs.manager import GatewayKernelSpecManager
from gateway_slurm.gateway.specs.projects import keys_table
from gateway_slurm.kernels.model import TRANSITIONS, Phase
from gateway_slurm.link import wire
from gateway_slurm.request import fields_table
from gateway_slurm.slurm.formats import states_table
from gateway_slurm.slurm.rest.versions import versions_table

SAMPLE = "etc/jupyter_slurm_config.py"
GATEWAY_SAMPLE = "etc/jupyter_slurm_gateway_config.py"
_BLOCK = re.compile(r"(<!-- drawn: (?P<name>[a-z-]+) -->\n).*?(<!-- end: (?P=name) -->\n)", re.DOTALL)
_WIDTH = 110

# Defaults that are worked out when they are needed: as Python, and what that needs to be imported.
COMPUTED = {
    "launcher_python": ('[sys.executable, "python3"]', "import sys"),
    "hub_scopes": ('json.loads(os.environ.get("JUPYTERHUB_OAUTH_ACCESS_SCOPES") or "[]")', "import json, os"),
    "hub_api_url": ('os.environ.get("JUPYTERHUB_API_URL", "")', "import os"),
    "as_user_command": ('["sudo", "-n", "-u", "{user}", "--", HELPER]', "from gateway_slurm.slurm.sudo import HELPER"),
    "port": ('int(os.environ.get("JUPYTER_PORT", "8888"))', "import os"),
}

_SAMPLE_HEAD = '''\
"""Settings of gateway_slurm's kernel provisioner, each with its default, to be uncommented where it is to change.

Goes into a directory of Jupyter's config path (``config`` in the output of ``jupyter --paths``), such as
/etc/jupyter. Drawn from the code by scripts/draw_docs.py.
"""

c = get_config()  # noqa: F821
'''

_GATEWAY_SAMPLE_HEAD = '''\
"""Settings of the shared gateway, each with its default, to be uncommented where it is to change.

Goes into a directory of Jupyter's config path (``config`` in the output of ``jupyter --paths``), such as
/etc/jupyter, and beside it jupyter_slurm_config.py, which has the settings of Slurm and of allocations. Drawn
from the code by scripts/draw_docs.py.
"""

c = get_config()  # noqa: F821
'''

# Of what the gateway's classes have from Jupyter's, the settings that a gateway's admin may want. In words of our
# own: Jupyter's change with its versions.
INHERITED: dict[type[Configurable], dict[str, str]] = {
    SlurmGatewayApp: {
        "ip": "Address on which clients are served; `0.0.0.0` or `::` for all. Behind a reverse proxy on the same "
        "machine the default is right.",
        "port": "TCP port on which clients are served.",
        "port_retries": "How many ports after that one are tried if it is taken; a service sets 0.",
        "base_url": "Path before all others, such as `/services/gateway/` behind a JupyterHub.",
        "certfile": "File with the TLS certificate, for a gateway without a reverse proxy before it.",
        "keyfile": "File with its private key.",
        "sock": "Path of a Unix socket to listen on in place of TCP, for a reverse proxy on the same machine; "
        "`trusted_proxies` calls it `unix`.",
        "sock_mode": "Permissions of that socket.",
        "trust_xheaders": "Believe X-Forwarded-For and X-Forwarded-Proto, for the log and for redirects: only behind a "
        "proxy that sets them. Nobody is known by them.",
        "allow_origin": "A web page's origin that may use the gateway from a browser. Default: only pages of its own.",
        "max_body_size": "Bytes that a request's body may have.",
        "authenticate_prometheus": "Whether `/metrics` is for known users only.",
    },
    SlurmMappingKernelManager: {
        "default_kernel_name": "The kernelspec for clients that name none.",
        "cull_idle_timeout": "Seconds without activity after which a kernel is shut down. Default 0: never. A kernel "
        "that waits in the queue is not idle.",
        "cull_interval": "Seconds between looks for idle kernels.",
        "cull_connected": "Also shut down idle kernels that a frontend is connected to.",
        "cull_busy": "Also shut down kernels that compute, when nothing was heard of them for that long.",
    },
    GatewayKernelSpecManager: {
        "allowed_kernelspecs": "Names of the only kernelspecs to be served. Default: all.",
    },
}
GATEWAY_CLASSES: tuple[type[Configurable], ...] = (
    SlurmGatewayApp,
    GatewayIdentityProvider,
    GatewayKernelSpecManager,
    SlurmMappingKernelManager,
)

# What each message says; its number, sender and form are the code's.
MESSAGE_TEXTS = {
    "WELCOME": "the launcher is let in: its next token, timeouts, if it is kept, when to warn, where streams "
    "are, where else to dial, and which taking over this is",
    "START": "start a kernel: argv, environment, working directory, keys; on a restart the ports to keep",
    "SIGNAL": "signal a kernel's process group",
    "STOP": "kill a kernel's process group and forget its files",
    "RELEASE": "end all kernels and exit",
    "UNTIL": "the job ends then: Slurm says that its time limit was changed",
    "TELL": "a line for a direct kernel's standard error, by which users are warned",
    "REDIRECT": "in place of WELCOME: another server has taken the launcher over, and listens there",
    "ACK": "every client has a kernel's output up to that message: the launcher need not keep it",
    "STEP": "start a job step from inside the job, where the server cannot reach Slurm's commands",
    "STEP_END": "end such a step",
    "STEP_SEEN": "how a step ended has been heard",
    "LIST_STEPS": "which steps run in the job?",
    "PROBE": "listen for a moment where a direct kernel would, and answer this word with that one",
    "REPORT": "answer to WELCOME: the new token is taken, and this is how kernels, steps and streams are",
    "STARTED": "the kernel listens on all five channels, here",
    "FAILED": "the kernel did not come up: why, and the end of its output",
    "EXIT": "a kernel that had come up is gone: exit code or signal, and the end of its output",
    "NOTICE": "Slurm sent SIGTERM or SIGUSR1; the time limit is near; a log, or a line for a kernel, cannot be written",
    "STEPPED": "a step is over: srun's exit status, and the end of what it said",
    "STEPS": "answer to LIST_STEPS: what squeue said",
    "PROBED": "answer to PROBE: the ports, or why it cannot listen",
    "HEARTBEAT": "a sign of life; the server's says whether the job is kept, and where else to dial",
    "OPEN": "a client connected to a tunnelled kernel's channel",
    "DATA": "bytes of that connection",
    "CREDIT": "that many of its bytes were taken, so many more may be sent",
    "CLOSE": "that connection ended",
}
_SENDERS = {wire.UP: "launcher", wire.DOWN: "server", wire.BOTH: "both"}

PHASE_TEXTS = {
    Phase.NEW: "made, not started yet",
    Phase.STARTING: "START was sent; the kernel does not listen yet",
    Phase.RUNNING: "it listens on all channels",
    Phase.LOST: "its launcher's link broke: nothing is known, and for Jupyter it still lives",
    Phase.DEAD: "it exited, or its job is over; it may be started again",
}


def settings(of: type[Configurable] = ServiceSettings) -> dict[str, TraitType[object, object]]:
    """The admin's settings in the order in which the code has them; a base class's that is closed is none."""
    traits = of.class_own_traits(config=True)
    own = [name for name in vars(of) if name in traits and not str(traits[name].help).startswith("Not used")]
    return {name: of.class_traits()[name] for name in [*INHERITED.get(of, {}), *own]}


def help_text(trait: TraitType[object, object], of: type[Configurable] = ServiceSettings) -> str:
    """A setting's help, on one line, with the values that it may have."""
    words = INHERITED.get(of, {}).get(str(trait.name)) or " ".join(str(trait.help).split())
    if isinstance(trait, Enum):
        words += f" One of: {', '.join(map(repr, trait.values or ()))}."
    return words


def default_text(name: str, trait: TraitType[object, object]) -> str:
    """A setting's default, as Python."""
    if name in COMPUTED:
        return COMPUTED[name][0]
    return repr(trait.default()).replace("'", '"')


def settings_table(of: type[Configurable] = ServiceSettings) -> str:
    """Draw the settings as markdown, one line per setting."""
    lines = ["| setting | default | meaning |", "|---|---|---|"]
    for name, trait in settings(of).items():
        meaning = help_text(trait, of).replace("``", "`").replace("|", "\\|")
        lines.append(f"| `{name}` | `{default_text(name, trait)}` | {meaning} |")
    return "\n".join(lines) + "\n"


def sample_config() -> str:
    """Draw the sample: every setting commented out, at its default."""
    return "\n".join([_SAMPLE_HEAD, *_sample_lines(ServiceSettings, "SlurmService")])


def gateway_sample_config() -> str:
    """Draw the gateway's: every setting of its classes."""
    parts = [_GATEWAY_SAMPLE_HEAD]
    for one in GATEWAY_CLASSES:
        parts += [f"## -- {one.__name__} {'-' * (_WIDTH - 6 - len(one.__name__))}\n", *_sample_lines(one, one.__name__)]
    return "\n".join(parts)


def _sample_lines(of: type[Configurable], section: str) -> Iterator[str]:
    for name, trait in settings(of).items():
        imported = f"# {COMPUTED[name][1]}\n" if name in COMPUTED else ""
        line = _assignment(f"c.{section}.{name} = ", default_text(name, trait))
        yield _comment(help_text(trait, of).replace("``", "`")) + imported + line


def _assignment(target: str, value: str) -> str:
    """Commented out; a list that is long, in several lines."""
    if len(target + value) <= _WIDTH or not value.startswith("["):
        return f"# {target}{value}\n"
    lines = textwrap.wrap(value[1:-1], _WIDTH - 6)
    return "".join(f"# {line}\n" for line in [f"{target}[", *(f"    {line}" for line in lines), "]"])


def _comment(text: str) -> str:
    """Prose has two hashes, so that it stays a comment when the settings are uncommented."""
    return "".join(f"## {line}\n" for line in textwrap.wrap(" ".join(text.split()), _WIDTH))


def messages_table() -> str:
    """Draw the link's messages as markdown; raise KeyError for one that has no text here."""
    lines = ["| message | number | sent by | body | what it says |", "|---|---|---|---|---|"]
    for name, (number, who, form) in wire.MESSAGES.items():
        body = "JSON" if form == wire.JSON else "stream id, bytes"
        lines.append(f"| `{name}` | {number} | {_SENDERS[who]} | {body} | {MESSAGE_TEXTS[name]} |")
    return "\n".join(lines) + "\n"


def phases_table() -> str:
    """Draw the phases of a kernel and what may follow each, as a table and as a diagram."""
    lines = ["| phase | meaning | may become |", "|---|---|---|"]
    edges = []
    for phase, following in TRANSITIONS.items():
        names = [other.name for other in Phase if other in following]
        lines.append(f"| {phase.name} | {PHASE_TEXTS[phase]} | {', '.join(names)} |")
        edges += [f"    {phase.name} --> {name}" for name in names]
    return "\n".join([*lines, "", "```mermaid", "stateDiagram-v2", "    [*] --> NEW", *edges, "```"]) + "\n"


BLOCKS: dict[str, Callable[[], str]] = {
    "fields": fields_table,
    "settings": settings_table,
    "states": states_table,
    "rest-versions": versions_table,
    "walk-steps": steps_table,
    "phases": phases_table,
    "environment": dropped_table,
    "messages": messages_table,
    "project-keys": keys_table,
    "identity-settings": partial(settings_table, GatewayIdentityProvider),
    "kernelspec-settings": partial(settings_table, GatewayKernelSpecManager),
    "gateway-settings": partial(settings_table, SlurmGatewayApp),
    "kernel-settings": partial(settings_table, SlurmMappingKernelManager),
}


def drawn(root: Path) -> dict[Path, str]:
    """Every file that holds something drawn, and what it should hold; raise KeyError for an unknown block."""

    def block(match: re.Match[str]) -> str:
        used.add(match["name"])
        return f"{match[1]}{BLOCKS[match['name']]()}{match[3]}"

    used: set[str] = set()
    pages = {path: path.read_text() for path in sorted((root / "docs").rglob("*.md"))}
    texts = {path: _BLOCK.sub(block, text) for path, text in pages.items() if _BLOCK.search(text)}
    if missing := BLOCKS.keys() - used:
        raise SystemExit(f"draw_docs: no page under {root / 'docs'} shows {', '.join(sorted(missing))}")
    return {**texts, root / SAMPLE: sample_config(), root / GATEWAY_SAMPLE: gateway_sample_config()}


def main() -> int:
    """Draw, or check; name each file that was stale."""
    parser = argparse.ArgumentParser(description="Draw what the documentation takes from the code.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a file is stale")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent, help="the repository")
    arguments = parser.parse_args()
    stale = 0
    for path, text in drawn(arguments.root).items():
        if path.is_file() and path.read_text() == text:
            continue
        stale += 1
        what = "stale, run scripts/draw_docs.py" if arguments.check else "drawn"
        print(f"{path.relative_to(arguments.root)}: {what}")
        if not arguments.check:
            path.write_text(text)
    return 1 if stale and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
