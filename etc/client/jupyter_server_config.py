"""Settings of a user's Jupyter server (JupyterLab, Notebook) that takes its kernels from a shared gateway.

Copy this file to ``~/.jupyter``, or for all users of a machine to ``/etc/jupyter``. On the command line the same is
``jupyter lab --gateway-url=https://gateway.example.org``. ``jupyter slurm doctor --gateway-url=…`` checks it all.
"""

import os
from pathlib import Path

c = get_config()  # noqa: F821

c.GatewayClient.url = os.environ.get("JUPYTER_GATEWAY_URL") or "https://gateway.example.org"

# The token that the gateway's admin gave you, in a file that only you can read:
#   install -D -m 0600 /dev/stdin ~/.config/gateway_slurm/token
# Other users of the machine would see it on a command line. From the environment jupyter_server would write it to its
# log at each kernel's start, and terminals and local kernels would inherit it: it is taken out here.
token_file = Path("~/.config/gateway_slurm/token").expanduser()
token = os.environ.pop("JUPYTER_GATEWAY_AUTH_TOKEN", "")
if not token and token_file.is_file():
    if token_file.stat().st_mode & 0o077:
        raise PermissionError(f"other users can read {token_file}: run chmod 600 on it, and ask for a new token")
    token = token_file.read_text().strip()
if token:
    c.GatewayClient.auth_token = token

# If no authority that this machine knows has signed the gateway's certificate, start the server with SSL_CERT_FILE set
# to a file that contains it. (jupyter_server uses GatewayClient.ca_certs only together with a client_cert.)

# Seconds. A start is answered at once, even if its job waits. A restart is answered when the kernel runs again, which
# the gateway's start_timeout limits to two minutes.
c.GatewayClient.connect_timeout = 20.0
c.GatewayClient.request_timeout = 150.0

# A notebook tries every five seconds, for ten minutes, to reach a gateway that is away. By default it gives up after
# half a minute, and the page must be reloaded.
c.GatewayClient.gateway_retry_max = 120
c.GatewayClient.gateway_retry_interval_max = 5.0

# Request fields for kernels, if their project allows clients to set them.
# os.environ.setdefault("KERNEL_SLURM_GPUS", "1")
# os.environ.setdefault("KERNEL_SLURM_RUNTIME", "120")
# Variables of this server for kernels. The gateway accepts JPY_SESSION_NAME, the notebook's path: the job and the log
# file have its name. It accepts further variables if its admin allows them: "JPY_SESSION_NAME,LC_ALL,TZ".
c.GatewayClient.allowed_envs = "JPY_SESSION_NAME"
