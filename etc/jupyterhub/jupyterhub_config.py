"""What to add to jupyterhub_config.py of a JupyterHub beside a Slurm cluster. See README.md.

The two parts are independent: use the gateway, single-user servers on a login node, or both.
"""

c = get_config()  # noqa: F821

# -- The shared gateway as a service of the hub --------------------------------------------------------------------

c.JupyterHub.services = [
    {
        "name": "gateway",
        # The hub's proxy serves it as https://hub.example.org/services/gateway/.
        "url": "http://127.0.0.1:8889",
        # The hub starts the gateway, and restarts it when it ends. It runs as the hub's user, unless "user" names
        # another one. Slurm must know that user.
        "command": [
            "/opt/gateway_slurm/bin/jupyter",
            "slurm",
            "gateway",
            "--base-url=/services/gateway/",
            "--port=8889",
            "--SlurmGatewayApp.port_retries=0",
        ],
        "cwd": "/var/lib/gateway_slurm",
        # A hub passes on little of its environment. HOME may contain .jupyter/jupyter_slurm_gateway_config.py.
        # gateway_slurm.service explains the second variable.
        "environment": {"HOME": "/var/lib/gateway_slurm", "MALLOC_MMAP_THRESHOLD_": "262144"},
    },
    # For a gateway that systemd starts, or that runs on another machine, replace "command" and the keys after it by
    #   "api_token": "…"
    # In the gateway's settings name the hub's API and the scopes that its tokens must have:
    #   c.GatewayIdentityProvider.hub_api_url = "https://hub.example.org/hub/api"
    #   c.GatewayIdentityProvider.hub_scopes = ["access:services!service=gateway"]
]

# Every user may use the gateway, with a token of their own (Hub Control Panel, Token) or a token of their server.
c.JupyterHub.load_roles = [
    {"name": "user", "scopes": ["self", "access:services!service=gateway"]},
    {"name": "server", "scopes": ["users:activity!user", "access:servers!server", "access:services!service=gateway"]},
]

# -- Single-user servers on a login node -----------------------------------------------------------------------------

# gateway_slurm's provisioner runs the servers' kernels on nodes: see jupyter_server_config.py in this directory. Kernel
# starts are reported to the URL that jupyter-slurm-provisioner uses, with the server's JUPYTERHUB_API_TOKEN.
c.Spawner.environment = {
    "SLURM_PROVISIONER_JHUB_METRICS": "https://hub.example.org/services/metrics/kernels",
}
