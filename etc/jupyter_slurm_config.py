"""Settings of gateway_slurm's kernel provisioner, each with its default. Uncomment a line to change its value.

Copy this file to a directory of Jupyter's config path (``config`` in the output of ``jupyter --paths``), such as
/etc/jupyter. scripts/draw_docs.py generates it from the code.
"""

c = get_config()  # noqa: F821

## How Slurm is reached: `local:` by its commands on this machine, `ssh://[user@]login[:port]` by its commands on
## a login node, or `rest+http(s)://host:port` by its REST interface.
# c.SlurmService.cluster = "local:"

## OpenSSH's configuration file. For the login node that `cluster` names, its host, user, port, identities, jump
## hosts and known_hosts files are used.
# c.SlurmService.ssh_config = "~/.ssh/config"

## Private keys (mode 0600) for the login node. Default: those of `ssh_config`, then `~/.ssh/id_ed25519`,
## `id_ecdsa` and `id_rsa`. The SSH agent's keys are tried first.
# c.SlurmService.ssh_identity_files = []

## known_hosts files with the keys of the login node and of jump hosts. Default: those of `ssh_config`, then the
## user's and the system's. A host without a known key is refused.
# c.SlurmService.ssh_known_hosts = []

## File (mode 0600) with the answers to the login node's questions: a password, or one line for each question.
## Default: none; a user with a terminal is asked at the first login.
# c.SlurmService.ssh_password_file = ""

## Python (>= 3.9, no other package) on the login node. It runs a small program that is sent through the
## connection and leaves no file there.
# c.SlurmService.ssh_python = "python3"

## Seconds for each step of a login, and for the start of a program on the login node. Slow home directories and
## directory services take most of it.
# c.SlurmService.ssh_timeout = 20.0

## Whether launchers may connect through a relay on the login node, where `cluster` is `ssh://`: `always`,
## `never`, or `auto`. With `auto` they try this server's addresses, then the login node's; addresses that worked
## are tried first from then on. One of: 'auto', 'always', 'never'.
# c.SlurmService.relay = "auto"

## TCP port of the relay on the login node, or a range `low-high` of which the first free port is used. Default
## 0: any. The port stays the same while the server runs, and the next server of the same deployment uses it
## again.
# c.SlurmService.relay_port = "0"

## Host name or IP address of the login node as compute nodes reach it; launchers try it first. Default: the
## addresses of its interfaces, then its host name.
# c.SlurmService.relay_address = ""

## File (mode 0600) with the token for the REST interface; `{user}` in the path is replaced by the Unix user who
## owns the jobs. The file is read again when it changes, so another program can renew the token. Where `cluster`
## is a REST interface, this or `rest_token_command` is required.
# c.SlurmService.rest_token_file = ""

## Command (argv list; `{user}` is replaced) that prints a token for the REST interface, such as `scontrol token
## username={user} lifespan=3600`. It runs as this process's user, before a token expires and after a token is
## refused.
# c.SlurmService.rest_token_command = []

## Name by which Slurm and its REST interface know this process's user. Default: the name of the Unix user.
# c.SlurmService.rest_user = ""

## File (PEM) with the certificates of the authorities that sign the REST interface's certificate. Default: the
## system's authorities.
# c.SlurmService.rest_ca_file = ""

## Host name or IP address of this server as compute nodes reach it, with `:port` if a port is forwarded;
## launchers try it first. Default: the addresses of this machine's interfaces, then its host name.
# c.SlurmService.response_address = ""

## TCP port of the response socket, which launchers dial, or a range `low-high` of which the first free port is
## used (for several users' servers on one login node). Default 0: any.
# c.SlurmService.response_port = "0"

## Name of the network interface, or IP address, that the response socket listens on, for login nodes with an
## internal network. Default: all interfaces.
# c.SlurmService.response_interface = ""

## How clients reach a kernel whose request does not say: `direct` (TCP with CurveZMQ to the node; the kernel
## must support it), `tunnel` (through the launcher's link), or `auto`. `auto` takes `direct` if the kernelspec
## declares `supported_encryption` curve and this machine can dial the node, which is tried before each start,
## and else `tunnel`. The gateway, and a Jupyter server with its kernel manager, take `tunnel` for `auto` unless
## `kept_output` is 0. One of: 'auto', 'direct', 'tunnel'.
# c.SlurmService.connect = "auto"

## Range `low-high` of TCP ports on the nodes for direct kernels, which use five each, if a firewall opens only
## some ports. Default: any free port.
# c.SlurmService.kernel_ports = ""

## Where kernels that cannot use Unix sockets (not written in Python) may listen on loopback TCP: `exclusive` (in
## jobs that share their nodes with no other user, as `squeue` on the node says: those made with `--exclusive`,
## or in a partition with `OverSubscribe=EXCLUSIVE`), or `always`. On a node with other users, these can read
## what such a kernel publishes; they can send it nothing that it believes. One of: 'exclusive', 'always'.
# c.SlurmService.loopback_kernels = "exclusive"

## Pythons (>= 3.9, with pycryptodome >= 3.23) for the launcher on the nodes; the first one that exists there is
## used. Default: this server's Python, then `python3`.
# import sys
# c.SlurmService.launcher_python = [sys.executable, "python3"]

## Directory on the nodes (mode 0700) for the logs of kernels and launchers; `~` is the user's home directory
## there.
# c.SlurmService.log_directory = "~/.local/state/gateway_slurm"

## Days after their last change until a launcher removes logs from `log_directory`.
# c.SlurmService.log_retention = 30

## Directory on this machine in which the server makes a private directory for the tunnels' Unix sockets. Its
## path must be short, since a socket's path has at most 108 bytes. Default: the first of `$TMPDIR`, `/tmp`,
## `/var/tmp` and `$XDG_RUNTIME_DIR` that can be used.
# c.SlurmService.tunnel_directory = ""

## Name shared by servers that take over each other's kernels when one of them dies; letters, digits, `.`, `_`
## and `-`. Default: none, and no server takes over this process's kernels by itself. The gateway, and a Jupyter
## server with its kernel manager, set a name if none is set here.
# c.SlurmService.deployment = ""

## Name of the jobs that servers submit. `{notebook}` is replaced by the notebook's file name, or by the
## kernelspec's name for a kernel without a notebook; `{kernelspec}`, `{project}` and `{user}` are replaced, too.
## All users of the cluster can read it in squeue. Characters other than letters, digits and `. _ - + @ = :`
## become `_`, and the name is cut after 128 bytes.
# c.SlurmService.job_name = "{notebook}"

## Seconds that a job may wait in Slurm's queue; then the job is cancelled and the start fails. Default 0: no
## limit.
# c.SlurmService.queue_timeout = 0.0

## Seconds from when a job's script has begun until its launcher has connected. Slow home directories and cold
## file caches take most of it. Where it cannot be seen that the script has begun, and no prolog runs, the time
## counts from when Slurm reports the job as running.
# c.SlurmService.link_timeout = 60.0

## Seconds that Slurm's prolog may take on the nodes. Slurm reports a job as running meanwhile. Where it cannot
## be seen whether the job's script has begun, because the server does not read `log_directory` (other home
## directories, `run_as = "user"`), a launcher has this time and `link_timeout`, unless Slurm says that it has no
## prolog, or another launcher was up on the same node. Slurm's REST interface does not say. So there, a node
## that does not reach this server is reported after both times; the page and the log name it as a possible cause
## after `link_timeout`. Nodes that boot have no limit but Slurm's own.
# c.SlurmService.prolog_timeout = 300.0

## Seconds from the start of a kernel's process until it listens on all channels. A conda environment on a
## parallel file system can take a minute.
# c.SlurmService.start_timeout = 120.0

## Seconds after a kernel's death in which it may be restarted before its place in the allocation is released.
## Jupyter's restarter looks every 3 s, and does not report when it gives up.
# c.SlurmService.release_grace = 30.0

## Seconds without a server after which a launcher ends its kernels and exits. A job that was submitted for the
## launcher ends with it. 0: no limit.
# c.SlurmService.orphan_timeout = 900.0

## What a starting server does with jobs that servers of this store have submitted and that have had no server
## for `orphan_timeout`: `leave` logs them and leaves them to their launchers and time limits, `cancel` cancels
## them. Jobs that are kept, jobs in which another user's step runs, and jobs of other stores are always left.
## One of: 'leave', 'cancel'.
# c.SlurmService.orphan_jobs = "leave"

## MiB of each kernel's output that its launcher keeps on the node, in the job's memory, for the next server and
## for clients that are behind. Beyond that the oldest output is dropped, and clients see how much. At least 8
## MiB are kept, and the newest message up to 128 MiB. A message of that size may take twice its size for a
## moment. The output of a direct kernel is not kept. 0: 8 MiB, and `connect = auto` does not prefer the tunnel
## for the sake of the output.
# c.SlurmService.kept_output = 64

## Seconds between heartbeats on a link. After three missing ones the link counts as broken, as when a node has
## failed. Servers that share a `store_url` use at most 3, so that launchers leave a server that hangs before
## another server takes over its kernels.
# c.SlurmService.heartbeat = 10.0

## Minutes before an allocation's end at which its users are warned.
# c.SlurmService.walltime_warnings = [10.0, 5.0, 1.0]

## Command (argv list; `{project}` and `{user}`, the Unix user who owns the job, are replaced) that prints
## `export NAME=value` lines: a project's Slurm account and the environment of its jobs. It runs as this
## process's user. Default: none, and the project's name is the account.
# c.SlurmService.account_command = []

## umask of kernels, in octal: `"0002"` lets a user's group write, `"0077"` keeps new files private. Default: a
## server that a user runs for themselves on the cluster gives kernels its own umask, as Slurm does for jobs;
## kernels of other users, and those over SSH or REST, have `0022`. The launcher's own files are always private.
# c.SlurmService.umask = ""

## Resource limits of this process (`ulimit`) that jobs and job steps get, as the option `--propagate` of
## sbatch(1) names them: `ALL`, or a list such as `NOFILE,MEMLOCK`. Default: none; kernels have the limits that
## Slurm gives on the node. Slurm's REST interface passes none on.
# c.SlurmService.propagate = "NONE"

## Name of the variable by which `account_command` gives the account.
# c.SlurmService.account_variable = "BUDGET_ACCOUNTS"

## Path of slurm.conf, if it is neither the default path nor in SLURM_CONF.
# c.SlurmService.slurm_conf = ""

## Directories of Slurm's commands, separated by `:`, if they are not in PATH.
# c.SlurmService.slurm_path = ""

## Unix user who submits the jobs of an owner named by the gateway: `self`, this process's user, or `user`, the
## owner, by `as_user_command`. One of: 'self', 'user'.
# c.SlurmService.run_as = "self"

## Command (argv list; `{user}` is replaced) that starts the helper as another user. The helper reads from its
## standard input which command to run. docs/admins/security.md explains its installation.
# from gateway_slurm.slurm.sudo import HELPER
# c.SlurmService.as_user_command = ["sudo", "-n", "-u", "{user}", "--", HELPER]

## Lowest user id for which `run_as = "user"` runs kernels; lower ids are system accounts.
# c.SlurmService.min_user_uid = 1000

## Whether kernels may run as this process's own user where `run_as = "user"`. Such a kernel could do everything
## that this process can, with the jobs of all users.
# c.SlurmService.allow_own_user = False

## Store for the records of jobs, kernels and sessions: `postgresql://user@host/database` (one database for each
## Slurm cluster; keep the password in `~/.pgpass`), or `memory:` for no store. Default: an SQLite file for this
## user and host, in `~/.local/state/gateway_slurm`.
# c.SlurmService.store_url = ""

## File (mode 0600) with the key, 64 hexadecimal digits, that encrypts the secrets in the store. The server
## creates a missing file. Servers that share a store share the key. Default:
## `~/.local/state/gateway_slurm/store.key`.
# c.SlurmService.store_key_file = ""

## Seconds that one Slurm command may take. From Slurm 23.02 a client that the controller's rate limit delays
## waits inside the command.
# c.SlurmService.command_timeout = 60.0

## Seconds until Slurm is first asked about a waiting job. One `squeue` asks for all jobs, and the interval grows
## to fifteen times this.
# c.SlurmService.watch_interval = 1.0

## Seconds that an allocation is kept after its last kernel, so that the next kernel can use it. Default 0: it is
## released at once and costs nothing more.
# c.SlurmService.idle_timeout = 0.0

## Seconds that a job named by `jobid` must have left. A job with less time is refused.
# c.SlurmService.min_time_left = 60.0

## Seconds after a start in which the kernel manager must take the kernel over. A kernel manager that fails
## before that does not report it.
# c.SlurmService.post_launch_timeout = 10.0
