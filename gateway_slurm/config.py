"""The admin's settings, and the files on Jupyter's config path that hold them.

Every mode reads the same file, ``jupyter_slurm_config.py``: the provisioner, the gateway and the command line.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, Final, TypeVar

from jupyter_core.paths import jupyter_config_path
from traitlets import Bool, CFloat, CInt, CUnicode, Enum, Float, List, TraitError, Unicode, validate
from traitlets.config import Config, LoggingConfigurable
from traitlets.config.loader import PyFileConfigLoader

from gateway_slurm._util import is_user_name
from gateway_slurm.addresses import check_address
from gateway_slurm.errors import ConfigError
from gateway_slurm.link.steps import PROPAGATE
from gateway_slurm.slurm.names import check_template
from gateway_slurm.slurm.sudo import HELPER
from gateway_slurm.slurm.url import parse_cluster_url

FILE_NAME: Final = "jupyter_slurm_config.py"

C = TypeVar("C", bound=LoggingConfigurable)


class ServiceSettings(LoggingConfigurable):
    """The settings. Their section in the file is ``SlurmService``, the class that inherits them."""

    cluster = Unicode(
        "local:",
        help="""How Slurm is reached: ``local:`` by its commands on this machine, ``ssh://[user@]login[:port]`` by its
        commands on a login node, or ``rest+http(s)://host:port`` by its REST interface.""",
    )
    ssh_config = Unicode(
        "~/.ssh/config",
        help="""OpenSSH's configuration file. For the login node that ``cluster`` names, its host, user, port,
        identities, jump hosts and known_hosts files are used.""",
    )
    ssh_identity_files = List(
        Unicode(),
        help="""Private keys (mode 0600) for the login node. Default: those of ``ssh_config``, then
        ``~/.ssh/id_ed25519``, ``id_ecdsa`` and ``id_rsa``. The SSH agent's keys are tried first.""",
    )
    ssh_known_hosts = List(
        Unicode(),
        help="""known_hosts files with the keys of the login node and of jump hosts. Default: those of ``ssh_config``,
        then the user's and the system's. A host without a known key is refused.""",
    )
    ssh_password_file = Unicode(
        "",
        help="""File (mode 0600) with the answers to the login node's questions: a password, or one line for each
        question. Default: none; a user with a terminal is asked at the first login.""",
    )
    ssh_python = Unicode(
        "python3",
        help="""Python (>= 3.9, no other package) on the login node. It runs a small program that is sent through the
        connection and leaves no file there.""",
    )
    ssh_timeout = CFloat(
        20.0,
        help="""Seconds for each step of a login, and for the start of a program on the login node. Slow home
        directories and directory services take most of it.""",
    )
    relay = Enum(
        ["auto", "always", "never"],
        "auto",
        help="""Whether launchers may connect through a relay on the login node, where ``cluster`` is ``ssh://``:
        ``always``, ``never``, or ``auto``. With ``auto`` they try this server's addresses, then the login node's;
        addresses that worked are tried first from then on.""",
    )
    relay_port = CUnicode(
        "0",
        help="""TCP port of the relay on the login node, or a range ``low-high`` of which the first free port is used.
        Default 0: any. The port stays the same while the server runs, and the next server of the same deployment uses
        it again.""",
    )
    relay_address = Unicode(
        "",
        help="""Host name or IP address of the login node as compute nodes reach it; launchers try it first. Default:
        the addresses of its interfaces, then its host name.""",
    )
    rest_token_file = Unicode(
        "",
        help="""File (mode 0600) with the token for the REST interface; ``{user}`` in the path is replaced by the Unix
        user who owns the jobs. The file is read again when it changes, so another program can renew the token. Where
        ``cluster`` is a REST interface, this or ``rest_token_command`` is required.""",
    )
    rest_token_command = List(
        Unicode(),
        help="""Command (argv list; ``{user}`` is replaced) that prints a token for the REST interface, such as
        ``scontrol token username={user} lifespan=3600``. It runs as this process's user, before a token expires and
        after a token is refused.""",
    )
    rest_user = CUnicode(
        "",
        help="Name by which Slurm and its REST interface know this process's user. Default: the name of the Unix user.",
    )
    rest_ca_file = Unicode(
        "",
        help="""File (PEM) with the certificates of the authorities that sign the REST interface's certificate.
        Default: the system's authorities.""",
    )
    response_address = Unicode(
        "",
        help="""Host name or IP address of this server as compute nodes reach it, with ``:port`` if a port is
        forwarded; launchers try it first. Default: the addresses of this machine's interfaces, then its host name.""",
    )
    response_port = CUnicode(
        "0",
        help="""TCP port of the response socket, which launchers dial, or a range ``low-high`` of which the first free
        port is used (for several users' servers on one login node). Default 0: any.""",
    )
    response_interface = Unicode(
        "",
        help="""Name of the network interface, or IP address, that the response socket listens on, for login nodes
        with an internal network. Default: all interfaces.""",
    )
    connect = Enum(
        ["auto", "direct", "tunnel"],
        "auto",
        help="""How clients reach a kernel whose request does not say: ``direct`` (TCP with CurveZMQ to the node; the
        kernel must support it), ``tunnel`` (through the launcher's link), or ``auto``. ``auto`` takes ``direct`` if
        the kernelspec declares ``supported_encryption`` curve and this machine can dial the node, which is tried
        before each start, and else ``tunnel``. The gateway, and a Jupyter server with its kernel manager, take
        ``tunnel`` for ``auto`` unless ``kept_output`` is 0.""",
    )
    kernel_ports = Unicode(
        "",
        help="""Range ``low-high`` of TCP ports on the nodes for direct kernels, which use five each, if a firewall
        opens only some ports. Default: any free port.""",
    )
    loopback_kernels = Enum(
        ["exclusive", "always"],
        "exclusive",
        help="""Where kernels that cannot use Unix sockets (not written in Python) may listen on loopback TCP:
        ``exclusive`` (in jobs that share their nodes with no other user, as ``squeue`` on the node says: those made
        with ``--exclusive``, or in a partition with ``OverSubscribe=EXCLUSIVE``), or ``always``. On a node with other
        users, these can read what such a kernel publishes; they can send it nothing that it believes.""",
    )
    launcher_python = List(
        Unicode(),
        [sys.executable, "python3"],
        help="""Pythons (>= 3.9, with pycryptodome >= 3.23) for the launcher on the nodes; the first one that exists
        there is used. Default: this server's Python, then ``python3``.""",
    )
    log_directory = Unicode(
        "~/.local/state/gateway_slurm",
        help="""Directory on the nodes (mode 0700) for the logs of kernels and launchers; ``~`` is the user's home
        directory there.""",
    )
    log_retention = CInt(
        30,
        min=1,
        max=3650,
        help="Days after their last change until a launcher removes logs from ``log_directory``.",
    )
    tunnel_directory = Unicode(
        "",
        help="""Directory on this machine in which the server makes a private directory for the tunnels' Unix sockets.
        Its path must be short, since a socket's path has at most 108 bytes. Default: the first of ``$TMPDIR``,
        ``/tmp``, ``/var/tmp`` and ``$XDG_RUNTIME_DIR`` that can be used.""",
    )
    deployment = Unicode(
        "",
        help="""Name shared by servers that take over each other's kernels when one of them dies; letters, digits,
        ``.``, ``_`` and ``-``. Default: none, and no server takes over this process's kernels by itself. The gateway,
        and a Jupyter server with its kernel manager, set a name if none is set here.""",
    )
    job_name = Unicode(
        "{notebook}",
        help="""Name of the jobs that servers submit. ``{notebook}`` is replaced by the notebook's file name, or by the
        kernelspec's name for a kernel without a notebook; ``{kernelspec}``, ``{project}`` and ``{user}`` are replaced,
        too. All users of the cluster can read it in squeue. Characters other than letters, digits and ``. _ - + @ = :``
        become ``_``, and the name is cut after 128 bytes.""",
    )
    queue_timeout = CFloat(
        0.0,
        help="""Seconds that a job may wait in Slurm's queue; then the job is cancelled and the start fails. Default
        0: no limit.""",
    )
    link_timeout = CFloat(
        60.0,
        help="""Seconds from when a job's script has begun until its launcher has connected. Slow home directories and
        cold file caches take most of it. Where it cannot be seen that the script has begun, and no prolog runs, the
        time counts from when Slurm reports the job as running.""",
    )
    prolog_timeout = CFloat(
        300.0,
        help="""Seconds that Slurm's prolog may take on the nodes. Slurm reports a job as running meanwhile. Where it
        cannot be seen whether the job's script has begun, because the server does not read ``log_directory`` (other
        home directories, ``run_as = "user"``), a launcher has this time and ``link_timeout``, unless Slurm says that it
        has no prolog, or another launcher was up on the same node. Slurm's REST interface does not say. So there, a
        node that does not reach this server is reported after both times; the page and the log name it as a possible
        cause after ``link_timeout``. Nodes that boot have no limit but Slurm's own.""",
    )
    start_timeout = CFloat(
        120.0,
        help="""Seconds from the start of a kernel's process until it listens on all channels. A conda environment on
        a parallel file system can take a minute.""",
    )
    release_grace = CFloat(
        30.0,
        help="""Seconds after a kernel's death in which it may be restarted before its place in the allocation is
        released. Jupyter's restarter looks every 3 s, and does not report when it gives up.""",
    )
    orphan_timeout = CFloat(
        900.0,
        help="""Seconds without a server after which a launcher ends its kernels and exits. A job that was submitted
        for the launcher ends with it. 0: no limit.""",
    )
    orphan_jobs = Enum(
        ["leave", "cancel"],
        "leave",
        help="""What a starting server does with jobs that servers of this store have submitted and that have had no
        server for ``orphan_timeout``: ``leave`` logs them and leaves them to their launchers and time limits,
        ``cancel`` cancels them. Jobs that are kept, jobs in which another user's step runs, and jobs of other stores
        are always left.""",
    )
    kept_output = CInt(
        64,
        min=0,
        max=1024,
        help="""MiB of each kernel's output that its launcher keeps on the node, in the job's memory, for the next
        server and for clients that are behind. Beyond that the oldest output is dropped, and clients see how much. At
        least 8 MiB are kept, and the newest message up to 128 MiB. A message of that size may take twice its size for
        a moment. The output of a direct kernel is not kept. 0: 8 MiB, and ``connect = auto`` does not prefer the
        tunnel for the sake of the output.""",
    )
    heartbeat = CFloat(
        10.0,
        help="""Seconds between heartbeats on a link. After three missing ones the link counts as broken, as when a
        node has failed. Servers that share a ``store_url`` use at most 3, so that launchers leave a server that hangs
        before another server takes over its kernels.""",
    )
    walltime_warnings = List(
        CFloat(),
        [10.0, 5.0, 1.0],
        help="Minutes before an allocation's end at which its users are warned.",
    )
    account_command = List(
        Unicode(),
        help="""Command (argv list; ``{project}`` and ``{user}``, the Unix user who owns the job, are replaced) that
        prints ``export NAME=value`` lines: a project's Slurm account and the environment of its jobs. It runs as this
        process's user. Default: none, and the project's name is the account.""",
    )
    umask = CUnicode(
        help="""umask of kernels, in octal: ``"0002"`` lets a user's group write, ``"0077"`` keeps new files private.
        Default: a server that a user runs for themselves on the cluster gives kernels its own umask, as Slurm does for
        jobs; kernels of other users, and those over SSH or REST, have ``0022``. The launcher's own files are always
        private.""",
    )
    propagate = Unicode(
        "NONE",
        help="""Resource limits of this process (``ulimit``) that jobs and job steps get, as the option
        ``--propagate`` of sbatch(1) names them: ``ALL``, or a list such as ``NOFILE,MEMLOCK``. Default: none; kernels
        have the limits that Slurm gives on the node. Slurm's REST interface passes none on.""",
    )
    account_variable = Unicode(
        "BUDGET_ACCOUNTS",
        help="Name of the variable by which ``account_command`` gives the account.",
    )
    slurm_conf = Unicode("", help="Path of slurm.conf, if it is neither the default path nor in SLURM_CONF.")
    slurm_path = Unicode("", help="Directories of Slurm's commands, separated by ``:``, if they are not in PATH.")
    run_as = Enum(
        ["self", "user"],
        "self",
        help="""Unix user who submits the jobs of an owner named by the gateway: ``self``, this process's user, or
        ``user``, the owner, by ``as_user_command``.""",
    )
    as_user_command = List(
        Unicode(),
        ["sudo", "-n", "-u", "{user}", "--", HELPER],
        help="""Command (argv list; ``{user}`` is replaced) that starts the helper as another user. The helper reads
        from its standard input which command to run. docs/admins/security.md explains its installation.""",
    )
    min_user_uid = CInt(
        1000,
        help='Lowest user id for which ``run_as = "user"`` runs kernels; lower ids are system accounts.',
    )
    allow_own_user = Bool(
        False,
        help="""Whether kernels may run as this process's own user where ``run_as = "user"``. Such a kernel could do
        everything that this process can, with the jobs of all users.""",
    )
    store_url = Unicode(
        "",
        help="""Store for the records of jobs, kernels and sessions: ``postgresql://user@host/database`` (one database
        for each Slurm cluster; keep the password in ``~/.pgpass``), or ``memory:`` for no store. Default: an SQLite
        file for this user and host, in ``~/.local/state/gateway_slurm``.""",
    )
    store_key_file = Unicode(
        "",
        help="""File (mode 0600) with the key, 64 hexadecimal digits, that encrypts the secrets in the store. The
        server creates a missing file. Servers that share a store share the key. Default:
        ``~/.local/state/gateway_slurm/store.key``.""",
    )
    command_timeout = CFloat(
        60.0,
        help="""Seconds that one Slurm command may take. From Slurm 23.02 a client that the controller's rate limit
        delays waits inside the command.""",
    )
    watch_interval = CFloat(
        1.0,
        help="""Seconds until Slurm is first asked about a waiting job. One ``squeue`` asks for all jobs, and the
        interval grows to fifteen times this.""",
    )
    idle_timeout = CFloat(
        0.0,
        help="""Seconds that an allocation is kept after its last kernel, so that the next kernel can use it. Default
        0: it is released at once and costs nothing more.""",
    )
    min_time_left = CFloat(
        60.0,
        help="Seconds that a job named by ``jobid`` must have left. A job with less time is refused.",
    )
    post_launch_timeout = Float(
        10.0,
        help="""Seconds after a start in which the kernel manager must take the kernel over. A kernel manager that
        fails before that does not report it.""",
    )

    @validate("as_user_command")
    def _valid_command(self, proposal: Any) -> list[str]:
        if not any("{user}" in item for item in proposal["value"]):
            raise TraitError(f"SlurmService.as_user_command must contain {{user}}, not {proposal['value']!r}")
        return list(proposal["value"])

    @validate("umask")
    def _valid_umask(self, proposal: Any) -> str:
        if not re.fullmatch(r"(0?[0-7]{3})?", proposal["value"], re.ASCII):
            raise TraitError(f"SlurmService.umask must be three octal digits, not {proposal['value']!r}")
        return str(proposal["value"])

    @validate("propagate")
    def _valid_propagate(self, proposal: Any) -> str:
        names = proposal["value"].upper()
        if not re.fullmatch(PROPAGATE, names, re.ASCII):
            raise TraitError(
                "SlurmService.propagate must be NONE, ALL, or names of limits separated by commas (sbatch(1), "
                f"--propagate), not {proposal['value']!r}"
            )
        return str(names)

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

    @validate("job_name")
    def _valid_job_name(self, proposal: Any) -> str:
        try:
            return check_template(proposal["value"])
        except ValueError as error:
            raise TraitError(f"SlurmService.job_name must be {error}, not {proposal['value']!r}") from error

    @validate("rest_user")
    def _valid_rest_user(self, proposal: Any) -> str:
        if proposal["value"] and not is_user_name(proposal["value"]):
            raise TraitError(f"SlurmService.rest_user must be a user name, not {proposal['value']!r}")
        return str(proposal["value"])

    @validate("response_address")
    def _valid_address(self, proposal: Any) -> str:
        try:
            return check_address(proposal["value"])
        except ValueError as error:
            raise TraitError(
                "SlurmService.response_address must be a host name or IP address that launchers on the nodes can dial, "
                f"with :port if a port is forwarded ([address]:port for IPv6), not {proposal['value']!r}: {error}"
            ) from error

    @validate("response_port", "kernel_ports", "relay_port")
    def _valid_ports(self, proposal: Any) -> str:
        try:
            port_range(proposal["value"])
        except ValueError as error:
            name = f"SlurmService.{proposal['trait'].name}"
            raise TraitError(f"{name} must be a port or a range low-high, not {proposal['value']!r}") from error
        return str(proposal["value"])


for _trait in ServiceSettings.class_own_traits().values():
    _trait.tag(config=True)  # so that the file may set it


def port_range(text: str) -> tuple[int, int] | None:
    """The first and the last port of a setting: None for ``""`` and ``"0"``, (5000, 5100) for ``"5000-5100"``.

    One port is a range of one. Raises ValueError.
    """
    if text in ("", "0"):
        return None
    low, _dash, high = text.partition("-")
    first, last = int(low), int(high or low)
    if not 0 < first <= last < 65536:
        raise ValueError(text)
    return first, last


# -- files ------------------------------------------------------------------------------------------------


def load_admin_config(configurable: type[C], **traits: Any) -> C:
    """An instance of ``configurable`` with the settings of all files, and ``traits`` that no file sets.

    The first directory on Jupyter's config path has precedence. In a virtual environment that is the environment's own
    directory, before the user's. Raises ConfigError, which names the file and the setting.
    """
    config = Config()
    for path in config_files():
        config.merge(_read(path, configurable))
    return configurable(config=config, **traits)


def config_files() -> list[Path]:
    """The files that exist, in ascending precedence."""
    paths = [Path(directory) / FILE_NAME for directory in reversed(jupyter_config_path())]
    return [path for path in paths if path.is_file()]


def _read(path: Path, configurable: type[C]) -> Config:
    try:
        config = PyFileConfigLoader(path.name, str(path.parent)).load_config()
    except (Exception, SystemExit) as error:  # the file is Python code of the admin's
        raise ConfigError(f"{path} raised {type(error).__name__}: {error}") from error
    name = configurable.__name__
    known = configurable.class_trait_names(config=True)
    for section in config:
        if section != name:
            raise ConfigError(f"{path}: there is no section {section}; this file holds settings of {name}")
    for setting in config.get(name, {}):
        if setting not in known:
            raise ConfigError(
                f"{path}: there is no setting {name}.{setting}; the settings are {', '.join(sorted(known))}"
            )
    try:
        # Each file is checked by itself, so that the error names the file with the wrong value.
        configurable(config=config)
    except TraitError as error:
        raise ConfigError(f"{path}: {error}") from error
    return config
