"""Settings of gateway_slurm's kernel provisioner, each with its default. Uncomment a line to change its value.

Copy this file to a directory of Jupyter's config path (``config`` in the output of ``jupyter --paths``), such as
/etc/jupyter. scripts/draw_docs.py generates it from the code.
"""

c = get_config()  # noqa: F821

## How Slurm is reached: `local:`, by its commands on this machine; `ssh://[user@]login[:port]`, by its commands
## on a login node; or `rest+http(s)://host:port`, by its REST interface.
# c.SlurmService.cluster = "local:"

## OpenSSH's configuration file, followed for host, user, port, identities, jump hosts and known_hosts files of a
## login node that `cluster` names.
# c.SlurmService.ssh_config = "~/.ssh/config"

## Private keys (0600) to log in to the login node with. Default: the configuration's, then `~/.ssh/id_ed25519`,
## `id_ecdsa` and `id_rsa`; the agent's are tried before them.
# c.SlurmService.ssh_identity_files = []

## known_hosts files by which the keys of login node and jump hosts are checked. Default: the configuration's,
## then the user's and the system's. A host that they do not know is refused.
# c.SlurmService.ssh_known_hosts = []

## File (0600) with the answers to what the login node asks for: a password, or a line for each question.
## Default: none; a user with a terminal is asked at the first login.
# c.SlurmService.ssh_password_file = ""

## Python (>= 3.9, no further package) on the login node for what runs there: a small program that comes through
## the connection and leaves no file.
# c.SlurmService.ssh_python = "python3"

## Seconds for each step of a login, and for the start of a program on the login node; slow homes and directory
## services take most of it.
# c.SlurmService.ssh_timeout = 20.0

## Whether launchers may come by way of the login node, where `cluster` is `ssh://`: `always` by it only,
## `never`, or `auto`: they try this server's addresses, then the login node's, and those that worked come first
## from then on. One of: 'auto', 'always', 'never'.
# c.SlurmService.relay = "auto"

## TCP port of the login node that the relay listens on, or a range `low-high` of which the first free one is
## taken. Default 0: any. It stays the same while the server runs, and the next server, of the same deployment,
## listens there, too.
# c.SlurmService.relay_port = "0"

## Host name or IP address of the login node as compute nodes reach it; tried first. Default: only the addresses
## of its interfaces, then its host name.
# c.SlurmService.relay_address = ""

## File with the token for the REST interface (mode 0600; `{user}` is replaced by the user whose jobs they are to
## Slurm). It is read again when it has changed: who wrote it keeps it fresh. This or `rest_token_command` is
## needed where `cluster` is a REST interface.
# c.SlurmService.rest_token_file = ""

## Command (argv list; `{user}` is replaced) that prints a token for the REST interface, as `scontrol token
## username={user} lifespan=3600` does. It runs as this process's own account, again before a token expires, and
## when one is refused.
# c.SlurmService.rest_token_command = []

## Name by which the REST interface, and Slurm, know this process's own user. Default: the name of the user that
## it runs as.
# c.SlurmService.rest_user = ""

## File with the certificates (PEM) that sign the REST interface's. Default: the system's.
# c.SlurmService.rest_ca_file = ""

## Host name or IP address of this server as compute nodes reach it, optionally with `:port` where a port is
## forwarded. It is tried first; default: only the addresses that this machine finds on its own interfaces, then
## its host name.
# c.SlurmService.response_address = ""

## TCP port of the response socket that launchers dial, or a range `low-high` of which the first free one is
## taken (several users' servers on one login node). Default 0: any.
# c.SlurmService.response_port = "0"

## Name of the network interface, or an IP address, that the response socket listens on, for login nodes with an
## internal network. Default: all of them.
# c.SlurmService.response_interface = ""

## How clients reach kernels that do not say: `direct` (TCP with CurveZMQ to the node; the kernel must support
## it), `tunnel` (through the launcher's link), or `auto`: direct where the kernelspec declares
## `supported_encryption` curve and this machine can dial the node, which is tried before each start; else
## tunnel. The gateway, and a Jupyter server with its kernel manager, take the tunnel for `auto` unless
## `kept_output` is 0. One of: 'auto', 'direct', 'tunnel'.
# c.SlurmService.connect = "auto"

## Range `low-high` of TCP ports on the nodes for direct kernels, where a firewall lets only some through; five a
## kernel. Default: any free port.
# c.SlurmService.kernel_ports = ""

## Pythons (>= 3.9, with pycryptodome >= 3.23) for the launcher on the nodes; the first that exists there is
## taken. Default: this server's own, then `python3`.
# import sys
# c.SlurmService.launcher_python = [sys.executable, "python3"]

## Directory on the nodes (0700) for the kernels' and launchers' logs; `~` is the user's home there.
# c.SlurmService.log_directory = "~/.local/state/gateway_slurm"

## Directory on this machine in which a private one for the tunnels' Unix sockets is made; its path must be short
## (108 bytes for each socket). Default: the temporary directory.
# c.SlurmService.tunnel_directory = ""

## Name that servers share which take over each other's kernels when one of them is dead; letters, digits, `.`,
## `_` and `-`. Default: none, nobody takes this process's kernels by itself. The gateway and the Jupyter server
## of the kernel manager class set one where none is set here.
# c.SlurmService.deployment = ""

## Seconds that a job may wait in Slurm's queue before its start fails and the job is cancelled. Default 0: as
## long as it takes.
# c.SlurmService.queue_timeout = 0.0

## Seconds between Slurm saying that a job runs and its launcher dialling in; slow homes and cold file caches
## take most of it.
# c.SlurmService.link_timeout = 60.0

## Seconds between the start of a kernel's process and its listening on all channels; conda environments on a
## parallel file system can take a minute.
# c.SlurmService.start_timeout = 120.0

## Seconds after a kernel's death in which it may be started again before its place in the allocation is given up
## (Jupyter's restarter looks every 3 s, and when it gives up it tells nobody).
# c.SlurmService.release_grace = 30.0

## Seconds without a server after which a launcher ends its kernels and exits; a job that was submitted for it
## ends with it. 0: never.
# c.SlurmService.orphan_timeout = 900.0

## What a server does at its start with jobs that servers of this store submitted and none has any more, once
## `orphan_timeout` has passed for them: `leave` them to their launchers and time limits, and tell of them, or
## `cancel` them. Those to be kept, those in which somebody else's step runs, and other stores' jobs are left in
## any case. One of: 'leave', 'cancel'.
# c.SlurmService.orphan_jobs = "leave"

## MiB of each kernel's output that its launcher keeps on the node, in the job's memory, while no server or no
## client is there to take it; where it is more the oldest goes, and clients are told how much. Kernels that are
## busy may need twice that for a moment. The output of a direct kernel is not kept. 0: nothing is kept.
# c.SlurmService.kept_output = 64

## Seconds between signs of life on a link; after three without one it is taken for broken, as when a node
## vanishes. Of servers that share a `store_url` at most 3, so that launchers leave one that hangs when the
## others take it for dead.
# c.SlurmService.heartbeat = 10.0

## Minutes before an allocation's end at which a warning is given.
# c.SlurmService.walltime_warnings = [10.0, 5.0, 1.0]

## Command (argv list; `{project}` and `{user}`, the Unix user whose job it is, are replaced) whose `export
## NAME=value` lines give a project's Slurm account and the environment of its jobs. It runs as this process's
## own account. Default: none, the project's name is the account.
# c.SlurmService.account_command = []

## The name by which `account_command` gives the account.
# c.SlurmService.account_variable = "BUDGET_ACCOUNTS"

## Path of slurm.conf, where it is neither the default nor in SLURM_CONF.
# c.SlurmService.slurm_conf = ""

## Directories (`:` between them) of Slurm's commands, where PATH lacks them.
# c.SlurmService.slurm_path = ""

## As which Unix user jobs are submitted for an owner whom the gateway names: `self`, this process's own account,
## or `user`, the owner's, by `as_user_command`. One of: 'self', 'user'.
# c.SlurmService.run_as = "self"

## Command (argv list; `{user}` is replaced) that starts the helper as another user; what is to be run goes to
## its standard input. docs/admins/security.md says how to install it.
# from gateway_slurm.slurm.sudo import HELPER
# c.SlurmService.as_user_command = ["sudo", "-n", "-u", "{user}", "--", HELPER]

## Lowest user id for which `run_as = "user"` runs kernels; those below are the system's accounts.
# c.SlurmService.min_user_uid = 1000

## Whether kernels may run as this process's own account where `run_as = "user"`; they could do all that it can,
## with everybody's jobs.
# c.SlurmService.allow_own_user = False

## Where it is on record which jobs, kernels and sessions there are: `postgresql://user@host/database` (a
## database of its own for one Slurm cluster; the password is better in `~/.pgpass` than here), or `memory:` for
## nowhere. Default: an SQLite file of this user and host, in `~/.local/state/gateway_slurm`.
# c.SlurmService.store_url = ""

## File (0600) with the key, 64 hexadecimal digits, that secrets in the store are sealed with; one that is not
## there is made. Servers that share a store share it. Default: `~/.local/state/gateway_slurm/store.key`.
# c.SlurmService.store_key_file = ""

## Seconds that one Slurm command may take; from Slurm 23.02 a client that the controller limits waits inside the
## command.
# c.SlurmService.command_timeout = 60.0

## Seconds after which Slurm is first asked about a waiting job; one `squeue` serves all, and the pause grows to
## fifteen times this.
# c.SlurmService.watch_interval = 1.0

## Seconds that an allocation stays after its last kernel, for the next one to use it. Default 0: it is
## relinquished at once, as budgets want it.
# c.SlurmService.idle_timeout = 0.0

## Seconds that a job named by `jobid` must have left; less is refused as too short.
# c.SlurmService.min_time_left = 60.0

## Seconds after a start in which the kernel manager has to take the kernel over; one that fails in between tells
## nobody.
# c.SlurmService.post_launch_timeout = 10.0
