"""The admin's settings of the service, in ``jupyter_slurm_config.py``."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, TypeVar

from jupyter_core.paths import jupyter_config_path
from traitlets import Bool, CFloat, CInt, CUnicode, Enum, Float, List, TraitError, Unicode, default, validate
from traitlets.config import Config, LoggingConfigurable
from traitlets.config.loader import PyFileConfigLoader

from gateway_slurm.addresses import check_address
from gateway_slurm.errors import ConfigError
from gateway_slurm.slurm.sudo import HELPER
from gateway_slurm.slurm.url import parse_cluster_url


class ServiceSettings(LoggingConfigurable):
    """What an admin may set; the section of the file is ``SlurmService``, the class that uses them."""

    cluster = Unicode(
        "local:",
        config=True,
        help="""How Slurm is reached: ``local:``, by its commands on this machine;
        ``ssh://[user@]login[:port]``, by its commands on a login node; or
        ``rest+http(s)://host:port``, by its REST interface.""",
    )
    ssh_config = Unicode(
        "~/.ssh/config",
        config=True,
        help="""OpenSSH's configuration file, followed for host, user, port, identities, jump hosts and
        known_hosts files of a login node that ``cluster`` names.""",
    )
    ssh_identity_files = List(
        Unicode(),
        config=True,
        help="""Private keys (0600) to log in to the login node with. Default: the configuration's, then
        ``~/.ssh/id_ed25519``, ``id_ecdsa`` and ``id_rsa``; the agent's are tried before them.""",
    )
    ssh_known_hosts = List(
        Unicode(),
        config=True,
        help="""known_hosts files by which the keys of login node and jump hosts are checked. Default: the
        configuration's, then the user's and the system's. A host that they do not know is refused.""",
    )
    ssh_password_file = Unicode(
        "",
        config=True,
        help="""File (0600) with the answers to what the login node asks for: a password, or a line for
        each question. Default: none; a user with a terminal is asked at the first login.""",
    )
    ssh_python = Unicode(
        "python3",
        config=True,
        help="""Python (>= 3.9, no further package) on the login node for what runs there: a small program
        that comes through the connection and leaves no file.""",
    )
    ssh_timeout = CFloat(
        20.0,
        config=True,
        help="""Seconds for each step of a login, and for the start of a program on the login node; slow
        homes and directory services take most of it.""",
    )
    relay = Enum(
        ["auto", "always", "never"],
        "auto",
        config=True,
        help="""Whether launchers may come by way of the login node, where ``cluster`` is ``ssh://``:
        ``always`` by it only, ``never``, or ``auto``: they try this server's addresses, then the login
        node's, and those that worked come first from then on.""",
    )
    relay_port = CUnicode(
        "0",
        config=True,
        help="""TCP port of the login node that the relay listens on, or a range ``low-high`` of which the
        first free one is taken. Default 0: any. It stays the same while the server runs, and the next
        server, of the same deployment, listens there, too.""",
    )
    relay_address = Unicode(
        "",
        config=True,
        help="""Host name or IP address of the login node as compute nodes reach it; tried first. Default:
        only the addresses of its interfaces, then its host name.""",
    )
    rest_token_file = Unicode(
        "",
        config=True,
        help="""File with the token for the REST interface (mode 0600; ``{user}`` is replaced by the
        user whose jobs they are to Slurm). It is read again when it has changed: who wrote it keeps it
        fresh. This or ``rest_token_command`` is needed where ``cluster`` is a REST interface.""",
    )
    rest_token_command = List(
        Unicode(),
        config=True,
        help="""Command (argv list; ``{user}`` is replaced) that prints a token for the REST interface,
        as ``scontrol token username={user} lifespan=3600`` does. It runs as this process's own account,
        again before a token expires, and when one is refused.""",
    )
    rest_user = CUnicode(
        "",
        config=True,
        help="""Name by which the REST interface, and Slurm, know this process's own user. Default: the
        name of the user that it runs as.""",
    )
    rest_ca_file = Unicode(
        "",
        config=True,
        help="""File with the certificates (PEM) that sign the REST interface's. Default: the system's.""",
    )
    response_address = Unicode(
        "",
        config=True,
        help="""Host name or IP address of this server as compute nodes reach it, optionally with
        ``:port`` where a port is forwarded. It is tried first; default: only the addresses that
        this machine finds on its own interfaces, then its host name.""",
    )
    response_port = CUnicode(
        "0",
        config=True,
        help="""TCP port of the response socket that launchers dial, or a range ``low-high`` of which
        the first free one is taken (several users' servers on one login node). Default 0: any.""",
    )
    response_interface = Unicode(
        "",
        config=True,
        help="""Name of the network interface, or an IP address, that the response socket listens
        on, for login nodes with an internal network. Default: all of them.""",
    )
    connect = Enum(
        ["auto", "direct", "tunnel"],
        "auto",
        config=True,
        help="""How clients reach kernels that do not say: ``direct`` (TCP with CurveZMQ to the node;
        the kernel must support it), ``tunnel`` (through the launcher's link), or ``auto``: direct
        where the kernelspec declares ``supported_encryption`` curve and this machine can dial the
        node, which is tried before each start; else tunnel. The gateway, and a Jupyter server with
        its kernel manager, take the tunnel for ``auto`` unless ``kept_output`` is 0.""",
    )
    kernel_ports = Unicode(
        "",
        config=True,
        help="""Range ``low-high`` of TCP ports on the nodes for direct kernels, where a firewall
        lets only some through; five a kernel. Default: any free port.""",
    )
    launcher_python = List(
        Unicode(),
        config=True,
        help="""Pythons (>= 3.9, with pycryptodome >= 3.23) for the launcher on the nodes; the first
        that exists there is taken. Default: this server's own, then ``python3``.""",
    )
    log_directory = Unicode(
        "~/.local/state/gateway_slurm",
        config=True,
        help="""Directory on the nodes (0700) for the kernels' and launchers' logs; ``~`` is the
        user's home there.""",
    )
    tunnel_directory = Unicode(
        "",
        config=True,
        help="""Directory on this machine in which a private one for the tunnels' Unix sockets is
        made; its path must be short (108 bytes for each socket). Default: the temporary directory.""",
    )
    deployment = Unicode(
        "",
        config=True,
        help="""Name that servers share which take over each other's kernels when one of them is dead; letters,
        digits, ``.``, ``_`` and ``-``. Default: none, nobody takes this process's kernels by itself. The gateway
        and the Jupyter server of the kernel manager class set one where none is set here.""",
    )
    queue_timeout = CFloat(
        0.0,
        config=True,
        help="""Seconds that a job may wait in Slurm's queue before its start fails and the job is
        cancelled. Default 0: as long as it takes.""",
    )
    link_timeout = CFloat(
        60.0,
        config=True,
        help="""Seconds between Slurm saying that a job runs and its launcher dialling in; slow
        homes and cold file caches take most of it.""",
    )
    start_timeout = CFloat(
        120.0,
        config=True,
        help="""Seconds between the start of a kernel's process and its listening on all channels;
        conda environments on a parallel file system can take a minute.""",
    )
    release_grace = CFloat(
        30.0,
        config=True,
        help="""Seconds after a kernel's death in which it may be started again before its place in
        the allocation is given up (Jupyter's restarter looks every 3 s, and when it gives up it
        tells nobody).""",
    )
    orphan_timeout = CFloat(
        900.0,
        config=True,
        help="""Seconds without a server after which a launcher ends its kernels and exits; a job
        that was submitted for it ends with it. 0: never.""",
    )
    orphan_jobs = Enum(
        ["leave", "cancel"],
        "leave",
        config=True,
        help="""What a server does at its start with jobs that servers of this store submitted and none
        has any more, once ``orphan_timeout`` has passed for them: ``leave`` them to their launchers
        and time limits, and tell of them, or ``cancel`` them. Those to be kept, those in which somebody
        else's step runs, and other stores' jobs are left in any case.""",
    )
    kept_output = CInt(
        64,
        min=0,
        max=1024,
        config=True,
        help="""MiB of each kernel's output that its launcher keeps on the node, in the job's memory, while no
        server or no client is there to take it; where it is more the oldest goes, and clients are told how much.
        Kernels that are busy may need twice that for a moment. The output of a direct kernel is not kept.
        0: nothing is kept.""",
    )
    heartbeat = CFloat(
        10.0,
        config=True,
        help="""Seconds between signs of life on a link; after three without one it is taken for
        broken, as when a node vanishes. Of servers that share a ``store_url`` at most 3, so that launchers
        leave one that hangs when the others take it for dead.""",
    )
    walltime_warnings = List(
        CFloat(),
        [10.0, 5.0, 1.0],
        config=True,
        help="Minutes before an allocation's end at which a warning is given.",
    )
    account_command = List(
        Unicode(),
        config=True,
        help="""Command (argv list; ``{project}`` and ``{user}``, the Unix user whose job it is, are
        replaced) whose ``export NAME=value`` lines give a project's Slurm account and the
        environment of its jobs. It runs as this process's own account. Default: none, the project's
        name is the account.""",
    )
    account_variable = Unicode(
        "BUDGET_ACCOUNTS",
        config=True,
        help="The name by which ``account_command`` gives the account.",
    )
    slurm_conf = Unicode("", config=True, help="Path of slurm.conf, where it is neither the default nor in SLURM_CONF.")
    slurm_path = Unicode(
        "", config=True, help="Directories (``:`` between them) of Slurm's commands, where PATH lacks them."
    )
    run_as = Enum(
        ["self", "user"],
        "self",
        config=True,
        help="""As which Unix user jobs are submitted for an owner whom the gateway names: ``self``, this
        process's own account, or ``user``, the owner's, by ``as_user_command``.""",
    )
    as_user_command = List(
        Unicode(),
        config=True,
        help="""Command (argv list; ``{user}`` is replaced) that starts the helper as another user; what is
        to be run goes to its standard input. docs/admins/security.md says how to install it.""",
    )
    min_user_uid = CInt(
        1000,
        config=True,
        help="""Lowest user id for which ``run_as = "user"`` runs kernels; those below are the system's
        accounts.""",
    )
    allow_own_user = Bool(
        False,
        config=True,
        help="""Whether kernels may run as this process's own account where ``run_as = "user"``; they could
        do all that it can, with everybody's jobs.""",
    )
    store_url = Unicode(
        "",
        config=True,
        help="""Where it is on record which jobs, kernels and sessions there are: ``postgresql://user@host/database``
        (a database of its own for one Slurm cluster; the password is better in ``~/.pgpass`` than here), or
        ``memory:`` for nowhere. Default: an SQLite file of this user and host, in
        ``~/.local/state/gateway_slurm``.""",
    )
    store_key_file = Unicode(
        "",
        config=True,
        help="""File (0600) with the key, 64 hexadecimal digits, that secrets in the store are sealed with; one that is
        not there is made. Servers that share a store share it. Default: ``~/.local/state/gateway_slurm/store.key``.""",
    )
    command_timeout = CFloat(
        60.0,
        config=True,
        help="""Seconds that one Slurm command may take; from Slurm 23.02 a client that the
        controller limits waits inside the command.""",
    )
    watch_interval = CFloat(
        1.0,
        config=True,
        help="""Seconds after which Slurm is first asked about a waiting job; one ``squeue`` serves
        all, and the pause grows to fifteen times this.""",
    )
    idle_timeout = CFloat(
        0.0,
        config=True,
        help="""Seconds that an allocation stays after its last kernel, for the next one to use it.
        Default 0: it is relinquished at once, as budgets want it.""",
    )
    min_time_left = CFloat(
        60.0,
        config=True,
        help="Seconds that a job named by ``jobid`` must have left; less is refused as too short.",
    )
    post_launch_timeout = Float(
        10.0,
        config=True,
        help="""Seconds after a start in which the kernel manager has to take the kernel over; one
        that fails in between tells nobody.""",
    )

    @default("launcher_python")
    def _default_launcher_python(self) -> list[str]:
        return [sys.executable, "python3"]

    @default("as_user_command")
    def _default_as_user_command(self) -> list[str]:
        return ["sudo", "-n", "-u", "{user}", "--", HELPER]

    @validate("as_user_command")
    def _valid_command(self, proposal: Any) -> list[str]:
        if not any("{user}" in item for item in proposal["value"]):
            raise TraitError(f"SlurmService.as_user_command must hold {{user}}, and {proposal['value']!r} does not")
        return list(proposal["value"])

    @validate("ssh_python")
    def _valid_python(self, proposal: Any) -> str:
        if not re.fullmatch(r"[A-Za-z0-9_./+-]+", proposal["value"]):
            raise TraitError(
                f"SlurmService.ssh_python must be a path of letters, digits and _ . / + -, not {proposal['value']!r}"
            )
        return str(proposal["value"])

    @validate("cluster")
    def _valid_cluster(self, proposal: Any) -> str:
        try:
            return str(parse_cluster_url(proposal["value"]))
        except ValueError as error:
            raise TraitError(f"SlurmService.cluster: {error}") from error

    @validate("rest_user")
    def _valid_rest_user(self, proposal: Any) -> str:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.@-]{0,63}|", proposal["value"], re.ASCII):
            raise TraitError(f"SlurmService.rest_user must be the name of a user, not {proposal['value']!r}")
        return str(proposal["value"])

    @validate("response_address")
    def _valid_address(self, proposal: Any) -> str:
        try:
            return check_address(proposal["value"])
        except ValueError as error:
            raise TraitError(
                "SlurmService.response_address must be a host's name or IP address, as launchers on the nodes dial it, "
                f"with :port where a port is forwarded ([address]:port for IPv6), not {proposal['value']!r}: {error}"
            ) from error

    @validate("response_port", "kernel_ports", "relay_port")
    def _valid_ports(self, proposal: Any) -> str:
        try:
            port_range(proposal["value"])
        except ValueError as error:
            name = f"SlurmService.{proposal['trait'].name}"
            raise TraitError(f"{name} must be a port or a range low-high, not {proposal['value']!r}") from error
        return str(proposal["value"])


def port_range(text: str) -> tuple[int, int] | None:
    """``""`` or ``"0"``: None; ``"5000"``: (5000, 5000); ``"5000-5100"``: (5000, 5100)."""
    if text in ("", "0"):
        return None
    low, _dash, high = text.partition("-")
    first, last = int(low), int(high or low)
    if not 0 < first <= last < 65536:
        raise ValueError(text)
    return first, last


# -- The admin's settings: ``jupyter_slurm_config.py`` on Jupyter's config path, in every mode alike. --


FILE_NAME = "jupyter_slurm_config.py"

C = TypeVar("C", bound=LoggingConfigurable)


def load_admin_config(configurable: type[C]) -> C:
    """An instance of ``configurable`` with the settings of all files found.

    What comes first on Jupyter's config path wins; in a virtual environment that is the
    environment's own directory, before the user's.

    Raises ConfigError that names file and setting.
    """
    config = Config()
    for path in config_files():
        config.merge(_read(path, configurable))
    return configurable(config=config)


def config_files() -> list[Path]:
    """Those that are there, the one that wins last."""
    # The path begins with what wins.
    paths = [Path(directory) / FILE_NAME for directory in reversed(jupyter_config_path())]
    return [path for path in paths if path.is_file()]


def _read(path: Path, configurable: type[C]) -> Config:
    try:
        config = PyFileConfigLoader(path.name, str(path.parent)).load_config()
    except (Exception, SystemExit) as error:  # the file is Python: what it raises is the admin's to mend
        raise ConfigError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    name = configurable.__name__
    known = configurable.class_trait_names(config=True)
    for section in config:
        if section != name:
            raise ConfigError(f"{path}: there is no class {section} to set; the settings are those of {name}")
    for setting in config.get(name, {}):
        if setting not in known:
            raise ConfigError(f"{path}: there is no setting {name}.{setting}; known are {', '.join(sorted(known))}")
    try:
        # Each file alone, so that a wrong value is reported with the file it stands in.
        configurable(config=config)
    except TraitError as error:
        raise ConfigError(f"{path}: {error}") from error
    return config
