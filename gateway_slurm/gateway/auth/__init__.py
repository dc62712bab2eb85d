"""Authentication by the gateway's own tokens, a JupyterHub, or a reverse proxy's header. Knows no kernel."""
