"""Settings of the shared gateway, each with its default. Uncomment a line to change its value.

Copy this file to a directory of Jupyter's config path (``config`` in the output of ``jupyter --paths``), such as
/etc/jupyter. The settings for Slurm and for allocations are in jupyter_slurm_config.py. scripts/draw_docs.py
generates this file from the code.
"""

c = get_config()  # noqa: F821

## -- SlurmGatewayApp -----------------------------------------------------------------------------------------

## Address on which the gateway serves clients; `0.0.0.0` or `::` for all addresses. The default suits a gateway
## behind a reverse proxy on the same machine.
# c.SlurmGatewayApp.ip = "localhost"

## TCP port on which the gateway serves clients.
# import os
# c.SlurmGatewayApp.port = int(os.environ.get("JUPYTER_PORT", "8888"))

## How many higher ports the gateway tries if this one is taken; set 0 for a service.
# c.SlurmGatewayApp.port_retries = 50

## Prefix of all paths, such as `/services/gateway/` behind a JupyterHub.
# c.SlurmGatewayApp.base_url = "/"

## File with the TLS certificate, for a gateway without a reverse proxy in front of it.
# c.SlurmGatewayApp.certfile = ""

## File with the private key of `certfile`.
# c.SlurmGatewayApp.keyfile = ""

## Path of a Unix socket to listen on instead of TCP, for a reverse proxy on the same machine; `trusted_proxies`
## calls such a proxy `unix`.
# c.SlurmGatewayApp.sock = ""

## Permissions of that socket.
# c.SlurmGatewayApp.sock_mode = "0600"

## Use X-Forwarded-For and X-Forwarded-Proto in the log and in redirects. Set it only behind a proxy that sets
## these headers. The gateway identifies no user by them.
# c.SlurmGatewayApp.trust_xheaders = False

## Origin of the web pages that may use the gateway from a browser. Default: only the gateway's own origin.
# c.SlurmGatewayApp.allow_origin = ""

## Largest body of a request (bytes).
# c.SlurmGatewayApp.max_body_size = 4194304

## Whether only admins and the users in `metrics_users` may read `/metrics`.
# c.SlurmGatewayApp.authenticate_prometheus = True

## URL, with the base URL, at which the other gateways of the deployment reach this process itself, not a load
## balancer. With https the certificate must have the URL's host name. Default: made from `ip` (for all
## addresses, this machine's name), `port` and `certfile`; empty with `sock`, where no other gateway can forward
## requests to it.
# c.SlurmGatewayApp.peer_url = ""

## File with the certificates of the authorities that sign the other gateways' certificates. Default: the
## system's authorities.
# c.SlurmGatewayApp.peer_cafile = ""

## File for the audit log: which user started, ended or was refused which kernel or allocation, and refused
## logins, as lines of JSON. The gateway creates it with mode 0600, and opens it again when it was moved.
## Default: none.
# c.SlurmGatewayApp.audit_log = ""

## Number of users whose kernels `/metrics` counts by name, those with the most kernels; the others are counted
## together. Default 0: no names of users are in the metrics.
# c.SlurmGatewayApp.metrics_max_users = 0

## Seconds that a client's new connection may take until the headers of its first request have arrived.
# c.SlurmGatewayApp.request_timeout = 20.0

## Seconds that a request's body may take to arrive.
# c.SlurmGatewayApp.body_timeout = 60.0

## Seconds that a connection is kept open for the client's next request. A proxy in front of the gateway must
## close its idle connections earlier, as nginx does by default.
# c.SlurmGatewayApp.idle_timeout = 75.0

## Seconds between two checks of the users of open websockets. A websocket is closed whose token was removed or
## has expired, whose user has logged out of the JupyterHub, or whose kernel's owner has left the project.
# c.SlurmGatewayApp.recheck_interval = 30.0

## Number of connections on which no request had a valid token yet. One more closes the oldest of the address
## that has most, if it is older than a second. Those of trusted_proxies, and by a Unix socket, are not counted.
# c.SlurmGatewayApp.max_unknown_connections = 1024

## The same for one client address; in IPv6 for one /64 network.
# c.SlurmGatewayApp.max_unknown_per_address = 256

## -- GatewayIdentityProvider ---------------------------------------------------------------------------------

## Path of the file with the hashes of the users' tokens, which `jupyter slurm token` writes; only the gateway's
## user may read it. Default: none; the gateway has no tokens of its own.
# c.GatewayIdentityProvider.tokens_file = ""

## URL of a JupyterHub's API, such as `https://hub.example/hub/api`, which knows the user of a token. Default:
## JUPYTERHUB_API_URL, which a hub sets for its services; if empty, no hub is asked.
# import os
# c.GatewayIdentityProvider.hub_api_url = os.environ.get("JUPYTERHUB_API_URL", "")

## Seconds that the hub may take to answer. Then the request fails with status 503, and the client may repeat it.
# c.GatewayIdentityProvider.hub_timeout = 10.0

## Seconds for which the gateway uses the hub's answer about a token again. A revoked token still works for as
## long.
# c.GatewayIdentityProvider.hub_cache_seconds = 60.0

## Scopes of which a hub's token must have one, such as `access:services!service=NAME`. Without them a token that
## its user gave to another service works here, too. Default: those that a hub sets for its services
## (JUPYTERHUB_OAUTH_ACCESS_SCOPES), or none.
# import json, os
# c.GatewayIdentityProvider.hub_scopes = json.loads(os.environ.get("JUPYTERHUB_OAUTH_ACCESS_SCOPES") or "[]")

## Names of hub services that may start kernels for other users. Default: none; the tokens of services are
## refused.
# c.GatewayIdentityProvider.hub_services = []

## Header in which a reverse proxy names the user, such as `X-Remote-User`; the proxy must remove it from what
## clients send. Default: none.
# c.GatewayIdentityProvider.trusted_header = ""

## Addresses and networks of the proxies that may send `trusted_header`; `unix` for a Unix socket. A request with
## the header from any other address is refused.
# c.GatewayIdentityProvider.trusted_proxies = []

## Users who may see and end all users' kernels, besides those with an admin's token. A hub's admins must be
## named here, too.
# c.GatewayIdentityProvider.admins = []

## Users who may read `/metrics`, besides admins, such as the name of Prometheus's token. Others are refused,
## unless `ServerApp.authenticate_prometheus` is False.
# c.GatewayIdentityProvider.metrics_users = []

## Accept `?token=` when a websocket is opened, for clients that can set no headers there: browsers and VS Code.
## A proxy in front of the gateway may write the token to its log.
# c.GatewayIdentityProvider.allow_token_in_url = False

## -- GatewayKernelSpecManager --------------------------------------------------------------------------------

## Names of the kernelspecs that the gateway serves. Default: all.
# c.GatewayKernelSpecManager.allowed_kernelspecs = set()

## Directory with one directory of kernelspecs per project. Default: none; the gateway has no projects.
# c.GatewayKernelSpecManager.projects_root = ""

## Also serve the kernelspecs that are installed on Jupyter's path, to all users.
# c.GatewayKernelSpecManager.serve_installed = True

## Also serve kernelspecs of other provisioners than Slurm's. Their kernels run on the gateway's own host, as the
## gateway's user, and can read its tokens. For experiments only.
# c.GatewayKernelSpecManager.allow_local = False

## Request fields that clients may set by `KERNEL_SLURM_<FIELD>`, unless the kernelspec's project has its own
## list. Slurm's limits apply as well.
# c.GatewayKernelSpecManager.allowed_client_fields = [
#     "jobid", "node", "nodes", "gpus", "cpus", "memory", "runtime", "time", "share", "isolate"
# ]

## Names of a client's environment variables that its kernels get, besides `KERNEL_*` and JPY_SESSION_NAME, the
## notebook's path. A name may end with `*`, as in `LC_*`.
# c.GatewayKernelSpecManager.allowed_envs = []

## Seconds for which the members of Unix groups and Slurm accounts are cached.
# c.GatewayKernelSpecManager.membership_age = 300.0

## -- SlurmMappingKernelManager -------------------------------------------------------------------------------

## The kernelspec for clients that do not name one.
# c.SlurmMappingKernelManager.default_kernel_name = "python3"

## Seconds without activity after which the server shuts a kernel down. Default 0: never. A kernel that waits in
## the queue is not idle.
# c.SlurmMappingKernelManager.cull_idle_timeout = 0

## Seconds between two checks for idle kernels.
# c.SlurmMappingKernelManager.cull_interval = 300

## Also shut down idle kernels to which a frontend is connected.
# c.SlurmMappingKernelManager.cull_connected = False

## Also shut down busy kernels that have sent nothing for `cull_idle_timeout`.
# c.SlurmMappingKernelManager.cull_busy = False

## Maximum number of kernels, starting ones included. 0: no limit.
# c.SlurmMappingKernelManager.max_kernels = 0

## Maximum number of one user's kernels, starting ones included. 0: no limit.
# c.SlurmMappingKernelManager.max_kernels_per_user = 0

## Maximum number of kernels of one user that are started or restarted in a minute, also those whose start fails.
## It is not applied where the server has one user. 0: no limit.
# c.SlurmMappingKernelManager.max_starts_per_minute = 100

## Maximum number of open websockets to one user's kernels: a page has one for each kernel that it shows. One
## more is refused with status 429. It is not applied where the server has one user. 0: no limit.
# c.SlurmMappingKernelManager.max_websockets_per_user = 100

## Seconds that a kernel that died, or did not start, is still listed, with the reason. Once a frontend has shown
## the reason, and no other lacks output, it is listed for some seconds only.
# c.SlurmMappingKernelManager.dead_kernel_linger = 600.0

## Whether kernels on Slurm end with the server. Default: they run on, and the next server restores them; without
## a next server they end after SlurmService.orphan_timeout.
# c.SlurmMappingKernelManager.kill_kernels_on_exit = False

## Maximum size in bytes of one message that a frontend sends, such as a cell with its text. The server needs
## several times the memory for it. A larger message is read and thrown away, and its cell fails with the reason;
## the frontend stays connected.
# c.SlurmMappingKernelManager.max_request_size = 134217728

## Maximum size in bytes of one part of a message that comes by ZMQ: its JSON text, or one of its buffers. These
## are replies, and all output of kernels that are direct or not on Slurm. The server needs the memory for it. A
## larger message ends the kernel's connection. The server makes it again, and says so under the cell. Other
## output comes from the kernel's journal (SlurmService.kept_output). 0: no limit.
# c.SlurmMappingKernelManager.max_message_size = 134217728

## Bytes that the server holds for one user at most: messages that wait for a kernel or for a page, the last
## output of kernels, uploads. Over it the largest of these is dropped or refused, with a reason under the cell,
## or the page connects again; output stays on the kernel's node. It is not applied where the server has one
## user. 0: no limit.
# c.SlurmMappingKernelManager.memory_per_user = 268435456

## Bytes that the server holds for all users together at most. Over it the user who has most pays, as over
## memory_per_user; 4 MiB are left to each. The process needs about 200 MiB beside it. 0: no limit.
# c.SlurmMappingKernelManager.memory_limit = 1073741824

## Whether a frontend shows, under the first cell that waits for its kernel, the job, its place in Slurm's queue
## and its expected start. The text is taken away before the cell runs; a notebook that is saved meanwhile has
## it.
# c.SlurmMappingKernelManager.show_waiting = True
