"""For a user's Jupyter server (JupyterLab, Notebook) whose kernels are to come from a shared gateway.

Goes into ``~/.jupyter``, or for all users of a machine into ``/etc/jupyter``. The same on the command line:
``jupyter lab --gateway-url=https://gateway.example.org``, with the token in JUPYTER_GATEWAY_AUTH_TOKEN.
"""

import os
from pathlib import Path

c = get_config()  # noqa: F821

c.GatewayClient.url = os.environ.get("JUPYTER_GATEWAY_URL") or "https://gateway.example.org"

# The token, which the gateway's admin gave you, from the environment; or from a file that only you can read:
#   install -m 0600 /dev/stdin ~/.config/gateway_slurm/token
# On a command line other users of the machine would see it.
token_file = Path("~/.config/gateway_slurm/token").expanduser()
if os.environ.get("JUPYTER_GATEWAY_AUTH_TOKEN"):
    c.GatewayClient.auth_token = os.environ["JUPYTER_GATEWAY_AUTH_TOKEN"]
elif token_file.is_file():
    if token_file.stat().st_mode & 0o077:
        raise PermissionError(f"others can read {token_file}: chmod 600 it, and ask for a new token")
    c.GatewayClient.auth_token = token_file.read_text().strip()

# A certificate that is not signed by an authority that this machine knows: start the server with SSL_CERT_FILE set
# to a file that has it. (jupyter_server heeds GatewayClient.ca_certs only together with a client_cert.)

# Seconds. A start answers at once, however long its job then waits; a restart when the kernel is there again, for
# which the gateway's start_timeout leaves it two minutes.
c.GatewayClient.connect_timeout = 20.0
c.GatewayClient.request_timeout = 150.0

# What kernels are to have, where their project lets clients say so.
# os.environ.setdefault("KERNEL_SLURM_GPUS", "1")
# os.environ.setdefault("KERNEL_SLURM_RUNTIME", "120")
# Further variables of this server's that kernels get, if the gateway takes them.
# c.GatewayClient.allowed_envs = "LC_ALL,TZ"
