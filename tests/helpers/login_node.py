"""The tests' login node, and a proxy to it that can be cut."""

import psutil

from gateway_slurm.testing.loginnode import USER, LoginNode, login_node, make_key
from gateway_slurm.testing.tcp_proxy import TcpProxy, tcp_proxy_to

__all__ = ["USER", "LoginNode", "TcpProxy", "login_node", "make_key", "sessions", "tcp_proxy_to"]


def sessions(node: LoginNode) -> list[psutil.Process]:
    """The processes of logged-in users on the login node."""
    assert node._process is not None
    children = psutil.Process(node._process.pid).children(recursive=True)
    return [process for process in children if process.is_running()]
