"""Generate the parts of the documentation that come from the code: ``draw_docs.py [--check] [--root DIR]``.

A page holds generated blocks between two comments, ``<!-- drawn: NAME -->`` and ``<!-- end: NAME -->``. The text
around a block is written by hand. The sample configurations in ``etc/`` are generated as a whole. With ``--check``
the script writes nothing, and its exit status is 1 if a file differs from what the code says.
"""

from __future__ import annotations

import argparse
import enum
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from traitlets import Enum, TraitType
from traitlets.config import Configurable

from gateway_slurm import SlurmMappingKernelManager
from gateway_slurm.allocations import model as allocation_model
from gateway_slurm.cli.doctor import steps
from gateway_slurm.config import ServiceSettings
from gateway_slurm.environment import DROPPED
from gateway_slurm.events import FIELDS as FIELDS_OF_EVENTS
from gateway_slurm.events import KINDS
from gateway_slurm.gateway.app import SlurmGatewayApp
from gateway_slurm.gateway.auth.identity import GatewayIdentityProvider
from gateway_slurm.gateway.specs.default import ORDER
from gateway_slurm.gateway.specs.manager import GatewayKernelSpecManager
from gateway_slurm.gateway.specs.projects import KEYS
from gateway_slurm.kernels.model import TRANSITIONS, Phase
from gateway_slurm.link import wire
from gateway_slurm.request import FIELDS
from gateway_slurm.slurm import formats
from gateway_slurm.slurm.reasons import REASONS
from gateway_slurm.slurm.rest.versions import VERSIONS
from launchers import slurm_variables

E = TypeVar("E", bound=enum.Enum)

SAMPLE = "etc/jupyter_slurm_config.py"
GATEWAY_SAMPLE = "etc/jupyter_slurm_gateway_config.py"
_BLOCK = re.compile(r"(<!-- drawn: (?P<name>[a-z-]+) -->\n).*?(<!-- end: (?P=name) -->\n)", re.DOTALL)
_WIDTH = 110

# Defaults that are computed at run time: the Python expression, and the imports that it needs.
COMPUTED = {
    "launcher_python": ('[sys.executable, "python3"]', "import sys"),
    "hub_scopes": ('json.loads(os.environ.get("JUPYTERHUB_OAUTH_ACCESS_SCOPES") or "[]")', "import json, os"),
    "hub_api_url": ('os.environ.get("JUPYTERHUB_API_URL", "")', "import os"),
    "as_user_command": ('["sudo", "-n", "-u", "{user}", "--", HELPER]', "from gateway_slurm.slurm.sudo import HELPER"),
    "port": ('int(os.environ.get("JUPYTER_PORT", "8888"))', "import os"),
}

_SAMPLE_HEAD = '''\
"""Settings of gateway_slurm's kernel provisioner, each with its default. Uncomment a line to change its value.

Copy this file to a directory of Jupyter's config path (``config`` in the output of ``jupyter --paths``), such as
/etc/jupyter. scripts/draw_docs.py generates it from the code.
"""

c = get_config()  # noqa: F821
'''

_GATEWAY_SAMPLE_HEAD = '''\
"""Settings of the shared gateway, each with its default. Uncomment a line to change its value.

Copy this file to a directory of Jupyter's config path (``config`` in the output of ``jupyter --paths``), such as
/etc/jupyter. The settings for Slurm and for allocations are in jupyter_slurm_config.py. scripts/draw_docs.py
generates this file from the code.
"""

c = get_config()  # noqa: F821
'''

# The settings inherited from Jupyter's classes that the admin of a gateway may want to change. The texts are our own,
# because Jupyter's help texts change with its versions.
INHERITED: dict[type[Configurable], dict[str, str]] = {
    SlurmGatewayApp: {
        "ip": "Address on which the gateway serves clients; `0.0.0.0` or `::` for all addresses. The default suits a "
        "gateway behind a reverse proxy on the same machine.",
        "port": "TCP port on which the gateway serves clients.",
        "port_retries": "How many higher ports the gateway tries if this one is taken; set 0 for a service.",
        "base_url": "Prefix of all paths, such as `/services/gateway/` behind a JupyterHub.",
        "certfile": "File with the TLS certificate, for a gateway without a reverse proxy in front of it.",
        "keyfile": "File with the private key of `certfile`.",
        "sock": "Path of a Unix socket to listen on instead of TCP, for a reverse proxy on the same machine; "
        "`trusted_proxies` calls such a proxy `unix`.",
        "sock_mode": "Permissions of that socket.",
        "trust_xheaders": "Use X-Forwarded-For and X-Forwarded-Proto in the log and in redirects. Set it only behind a "
        "proxy that sets these headers. The gateway identifies no user by them.",
        "allow_origin": "Origin of the web pages that may use the gateway from a browser. Default: only the gateway's "
        "own origin.",
        "max_body_size": "Largest body of a request (bytes).",
        "authenticate_prometheus": "Whether only admins and the users in `metrics_users` may read `/metrics`.",
    },
    SlurmMappingKernelManager: {
        "default_kernel_name": "The kernelspec for clients that do not name one.",
        "cull_idle_timeout": "Seconds without activity after which the server shuts a kernel down. Default 0: never. A "
        "kernel that waits in the queue is not idle.",
        "cull_interval": "Seconds between two checks for idle kernels.",
        "cull_connected": "Also shut down idle kernels to which a frontend is connected.",
        "cull_busy": "Also shut down busy kernels that have sent nothing for `cull_idle_timeout`.",
    },
    GatewayKernelSpecManager: {
        "allowed_kernelspecs": "Names of the kernelspecs that the gateway serves. Default: all.",
    },
}
GATEWAY_CLASSES: tuple[type[Configurable], ...] = (
    SlurmGatewayApp,
    GatewayIdentityProvider,
    GatewayKernelSpecManager,
    SlurmMappingKernelManager,
)

# What each message says; the number, the sender and the form come from the code.
MESSAGE_TEXTS = {
    "WELCOME": "the server accepts the launcher: the launcher's next token, timeouts, whether the job is kept, when to "
    "warn, the state of the tunnel's streams, other addresses to dial, and the epoch of the takeover",
    "START": "start a kernel: argv, environment, working directory, keys; on a restart the ports to keep",
    "SIGNAL": "send a signal to a kernel's process group",
    "STOP": "kill a kernel's process group and remove its files",
    "RELEASE": "end all kernels and exit",
    "END_TIME": "the new end of the job, after Slurm reported a changed time limit",
    "STDERR_LINE": "a line for a kernel's standard error, by which a plain Jupyter server warns the user",
    "REDIRECT": "instead of WELCOME: another server has taken the launcher over, and this is its address",
    "ACK": "what a kernel's journal keeps for the next server: positions of sessions, and notes",
    "STEP": "start a job step from inside the job, because the server cannot run srun",
    "STEP_END": "end a job step that STEP started",
    "STEP_ACK": "the server knows how the step ended",
    "LIST_STEPS": "list the job's running steps",
    "PROBE": "listen briefly on the ports of a direct kernel, and answer the given question with the given answer",
    "REPORT": "answer to WELCOME: the launcher has its new token; the state of its kernels, steps and streams",
    "STARTED": "the kernel listens on all five channels, at these addresses",
    "FAILED": "the kernel did not start: the reason, and the end of its output",
    "EXIT": "a started kernel has ended: exit code or signal, the end of its output, and whether memory was the cause",
    "NOTICE": "Slurm sent SIGTERM or SIGUSR1; the time limit is near; a log, or a line for a kernel, cannot be written",
    "STEPPED": "a step has ended: srun's exit status, and the end of srun's output",
    "STEP_LIST": "answer to LIST_STEPS: the output of squeue",
    "READ_LOG": "ask for the ends of a kernel's log and of the launcher's",
    "LOG": "answer to READ_LOG: the two texts; a log that cannot be read is an empty one",
    "PROBED": "answer to PROBE: the ports, or the reason why the launcher cannot listen",
    "HEARTBEAT": "a sign of life; the server's also says whether the job is kept, and which other addresses to dial",
    "OPEN": "a client connected to a channel of a tunnelled kernel, or the server reads its journal",
    "DATA": "bytes of that connection",
    "CREDIT": "the number of its bytes that the receiver has taken; the sender may send as many more",
    "CLOSE": "that connection ended",
}
_SENDERS = {wire.UP: "launcher", wire.DOWN: "server", wire.BOTH: "both"}

PHASE_TEXTS = {
    Phase.NEW: "created, not started yet",
    Phase.STARTING: "the server has sent START; the kernel does not listen yet",
    Phase.RUNNING: "the kernel listens on all channels",
    Phase.LOST: "the launcher's link broke: the state is unknown, and Jupyter still sees a living kernel",
    Phase.EXITED: "the process ended; whether its job ends with it is not known yet, and Jupyter still sees it alive",
    Phase.DEAD: "the kernel exited, or its job ended; the kernel may be started again",
}


def settings(of: type[Configurable] = ServiceSettings) -> dict[str, TraitType[object, object]]:
    """Return the admin's settings in the order of the code, without those that a subclass marks as not used."""
    traits = of.class_own_traits(config=True)
    own = [name for name in vars(of) if name in traits and not str(traits[name].help).startswith("Not used")]
    return {name: of.class_traits()[name] for name in [*INHERITED.get(of, {}), *own]}


def help_text(trait: TraitType[object, object], of: type[Configurable] = ServiceSettings) -> str:
    """Return a setting's help on one line, with its allowed values."""
    text = INHERITED.get(of, {}).get(str(trait.name)) or " ".join(str(trait.help).split())
    if isinstance(trait, Enum):
        text += f" One of: {', '.join(map(repr, trait.values or ()))}."
    return text


def default_text(name: str, trait: TraitType[object, object]) -> str:
    """Return a setting's default as a Python expression."""
    if name in COMPUTED:
        return COMPUTED[name][0]
    return repr(trait.default()).replace("'", '"')


def _table(header: str, rows: Iterable[Sequence[str]]) -> str:
    """Format a markdown table; ``header`` has ``|`` between the columns."""
    lines = [f"| {header} |", "|---" * (header.count("|") + 1) + "|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + "\n"


def fields_table() -> str:
    """Format the request's fields, one row per field."""
    rows = [(f"`{field.name}`", field.required or "no", field.help) for field in FIELDS]
    return _table("field | required | meaning (unit)", rows)


def states_table() -> str:
    """Format Slurm's job states, one row per state."""
    rows = [(f"`{name}`", f"`{code}`", meaning.name, meaning.value) for name, code, meaning in formats._TABLE]
    unknown = formats.Meaning.UNKNOWN
    lines = _table("state | code | meaning | what the server does", rows)
    return f"{lines}| anything else | | {unknown.name} | {unknown.value} |\n"


def reasons_table() -> str:
    """Format Slurm's reasons for a pending job, one row per kind."""
    rows = [(kind.title.replace("*", "\\*"), kind.outlook.value, kind.advice) for kind in REASONS]
    return _table("Slurm's reason | outlook | what to do", rows)


def versions_table() -> str:
    """Format the versions of the REST interface, one row per version."""
    rows = []
    for version in VERSIONS:
        gres = f"`tres_per_node`: `{version.gres}gpu:1`" if version.gres else "`gres`: `gpu:1`"
        shapes = (version.numbers, version.environment, version.state, version.exit_code)
        rows.append((version.name, version.slurm, *shapes, gres, version.options))
    return _table("version | first in Slurm | numbers | environment | job_state | exit_code | gres | options of", rows)


def steps_table() -> str:
    """Format the steps of the path check, one row per step."""
    rows = []
    for step, title in steps.STEPS.items():
        changes = dict.fromkeys(text.replace("|", "\\|") for name, _kind, text in steps._CHANGES if name == step)
        rows.append((title, "<br>".join(changes)))
    return _table("step | if it fails, change", rows)


def dropped_table() -> str:
    """Format the variables that a kernel does not inherit, one row per variable."""
    rows = [(f"`{name}`", reason) for name, reason in DROPPED]
    return _table("variable | why a kernel does not inherit it", rows)


def slurm_variables_table() -> str:
    """Format Slurm's variables that a kernel in a job step has otherwise than the step, one row per variable."""
    rows = [(f"`{name}`", *(text or "removed" for text in texts)) for name, texts in slurm_variables.SET.items()]
    removed = [(f"`{name}`", f"removed: {reason}", "removed") for name, reason in slurm_variables.REMOVED.items()]
    return _table("variable | in a job step with the whole job | isolated", [*rows, *removed])


def keys_table() -> str:
    """Format the keys of a project's file, one row per key."""
    return _table("key | meaning", [(f"`{key.name}`", key.help) for key in KEYS])


def default_table() -> str:
    """Format what is compared to find the kernelspec that asks for least, one row per amount."""
    return _table("compared | how it is counted", [(name, text) for name, text, _measure in ORDER])


def settings_table(of: type[Configurable] = ServiceSettings) -> str:
    """Format the settings as a markdown table, one row per setting."""
    rows = []
    for name, trait in settings(of).items():
        meaning = help_text(trait, of).replace("``", "`").replace("|", "\\|")
        rows.append((f"`{name}`", f"`{default_text(name, trait)}`", meaning))
    return _table("setting | default | meaning", rows)


def sample_config() -> str:
    """Generate the sample: every setting commented out, at its default."""
    return "\n".join([_SAMPLE_HEAD, *_sample_lines(ServiceSettings, "SlurmService")])


def gateway_sample_config() -> str:
    """Generate the gateway's sample: every setting of the gateway's classes."""
    parts = [_GATEWAY_SAMPLE_HEAD]
    for configurable in GATEWAY_CLASSES:
        name = configurable.__name__
        parts += [f"## -- {name} {'-' * (_WIDTH - 6 - len(name))}\n", *_sample_lines(configurable, name)]
    return "\n".join(parts)


def _sample_lines(of: type[Configurable], section: str) -> Iterator[str]:
    for name, trait in settings(of).items():
        imported = f"# {COMPUTED[name][1]}\n" if name in COMPUTED else ""
        line = _assignment(f"c.{section}.{name} = ", default_text(name, trait))
        yield _comment(help_text(trait, of).replace("``", "`")) + imported + line


def _assignment(target: str, value: str) -> str:
    """Format a commented-out assignment; a long list takes several lines."""
    if len(target + value) <= _WIDTH or not value.startswith("["):
        return f"# {target}{value}\n"
    lines = textwrap.wrap(value[1:-1], _WIDTH - 6)
    return "".join(f"# {line}\n" for line in [f"{target}[", *(f"    {line}" for line in lines), "]"])


def _comment(text: str) -> str:
    """Format prose with two hashes: it stays a comment when a user uncomments the settings."""
    return "".join(f"## {line}\n" for line in textwrap.wrap(" ".join(text.split()), _WIDTH))


def messages_table() -> str:
    """Format the link's messages as a markdown table; raise KeyError for a message without a text in this file."""
    rows = []
    for name, (number, sender, form) in wire.MESSAGES.items():
        body = "JSON" if form == wire.JSON else "stream id, bytes"
        rows.append((f"`{name}`", str(number), _SENDERS[sender], body, MESSAGE_TEXTS[name]))
    return _table("message | number | sent by | body | what it says", rows)


def phases_table() -> str:
    """Format the phases of a kernel and their transitions, as a table and as a diagram."""
    return _state_machine(TRANSITIONS, PHASE_TEXTS)


def allocation_phases_table() -> str:
    """The same for an allocation."""
    return _state_machine(allocation_model.TRANSITIONS, allocation_model.PHASE_TEXTS)


def _state_machine(transitions: Mapping[E, frozenset[E]], texts: Mapping[E, str]) -> str:
    lines = ["| phase | meaning | may become |", "|---|---|---|"]
    edges = [f"    [*] --> {next(iter(transitions)).name}"]
    for phase, following in transitions.items():
        names = [other.name for other in transitions if other in following]
        lines.append(f"| {phase.name} | {texts[phase]} | {', '.join(names) or 'none'} |")
        edges += [f"    {phase.name} --> {name}" for name in names]
        edges += [] if names else [f"    {phase.name} --> [*]"]
    return "\n".join([*lines, "", "```mermaid", "stateDiagram-v2", *edges, "```"]) + "\n"


def events_table() -> str:
    """The kinds of events."""
    rows = [[f"`{name}`", kind.topic or "the log only", kind.help] for name, kind in KINDS.items()]
    return _table("| event | topic | meaning |", rows)


def event_fields_table() -> str:
    """The fields of events."""
    return _table("| field | meaning |", [[f"`{name}`", text] for name, text in FIELDS_OF_EVENTS.items()])


BLOCKS: dict[str, Callable[[], str]] = {
    "fields": fields_table,
    "settings": settings_table,
    "states": states_table,
    "pending-reasons": reasons_table,
    "rest-versions": versions_table,
    "path-check-steps": steps_table,
    "phases": phases_table,
    "allocation-phases": allocation_phases_table,
    "environment": dropped_table,
    "slurm-variables": slurm_variables_table,
    "messages": messages_table,
    "events": events_table,
    "event-fields": event_fields_table,
    "project-keys": keys_table,
    "default-kernelspec": default_table,
    "identity-settings": partial(settings_table, GatewayIdentityProvider),
    "kernelspec-settings": partial(settings_table, GatewayKernelSpecManager),
    "gateway-settings": partial(settings_table, SlurmGatewayApp),
    "kernel-settings": partial(settings_table, SlurmMappingKernelManager),
}


def drawn(root: Path) -> dict[Path, str]:
    """Return every file with generated text, and its correct content; raise KeyError for an unknown block."""

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
    """Generate or check the files; print each file that was stale."""
    parser = argparse.ArgumentParser(description="Generate the parts of the documentation that come from the code.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with status 1 if a file is stale")
    parser.add_argument(
        "--root", type=Path, default=Path(__file__).resolve().parent.parent, help="root directory of the repository"
    )
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
