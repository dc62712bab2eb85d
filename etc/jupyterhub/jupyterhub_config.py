"""For a JupyterHub beside a Slurm cluster: what to add to its jupyterhub_config.py. README.md says more.

The two halves do not need each other: take the gateway, or single-user servers on a login node, or both.
"""

c = get_config()  # noqa: F821

# -- The shared gateway, as a service of the hub's -----------------------------------------------------------------

c.JupyterHub.services = [
    {
        "name": "gateway",
        # The hub's proxy serves it as https://hub.example.org/services/gateway/.
        "url": "http://127.0.0.1:8889",
        # The hub starts it, and again when it ends. As the hub's own account, unless "user" names another; it
        # must be one that Slurm knows.
        "command": [
            "/opt/gateway_slurm/bin/jupyter",
            "slurm",
            "gateway",
            "--base-url=/services/gateway/",
            "--port=8889",
            "--SlurmGatewayApp.port_retries=0",
        ],
        "cwd": "/var/lib/gateway_slurm",
        # A hub hands little of its environment on. A home with .jupyter/jupyter_slurm_gateway_config.py in it, say:
        "environment": {"HOME": "/var/lib/gateway_slurm"},
    },
    # A gateway that systemd starts, or that runs on another machine, has in place of "command" and what follows:
    #   "api_token": "…"
    # and its settings say where the hub is and which of its tokens count:
    #   c.GatewayIdentityProvider.hub_api_url = "https://hub.example.org/hub/api"
    #   c.GatewayIdentityProvider.hub_scopes = ["access:services!service=gateway"]
]

# Who may use it: every user, by tokens that they make (Hub Control Panel, Token), and by those of their servers.
c.JupyterHub.load_roles = [
    {"name": "user", "scopes": ["self", "access:services!service=gateway"]},
    {"name": "server", "scopes": ["users:activity!user", "access:servers!server", "access:services!service=gateway"]},
]

# -- Single-user servers on a login node -----------------------------------------------------------------------------

# The servers' kernels run on nodes by gateway_slurm's provisioner: jupyter_server_config.py beside this file.
# Kernel starts are counted where jupyter-slurm-provisioner's are, with each server's own JUPYTERHUB_API_TOKEN.
c.Spawner.environment = {
    "SLURM_PROVISIONER_JHUB_METRICS": "https://hub.example.org/services/metrics/kernels",
}
