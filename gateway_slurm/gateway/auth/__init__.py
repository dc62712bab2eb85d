"""Who a client is: tokens of the gateway's own, a JupyterHub's, or a reverse proxy's header. Knows no kernel."""
