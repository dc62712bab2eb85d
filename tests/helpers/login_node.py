"""The login node of the tests, and a line to it that can be cut."""

import psutil

from gateway_slurm.testing.loginnode import USER, LoginNode, login_node, make_key
from gateway_slurm.testing.tcp_proxy import TcpProxy, tcp_proxy_to

__all__ = ["USER", "LoginNode", "TcpProxy", "login_node", "make_key", "sessions", "tcp_proxy_to"]


def sessions(node: LoginNode) -> list[psutil.Process]:
    """What runs on the login node for those who have logged in."""
    assert node._process is not None
    return [one for one in psutil.Process(node._process.pid).children(recursive=True) if one.is_running()]
