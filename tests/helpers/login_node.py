"""The login node of the tests, and a line to it that can be cut."""

import psutil

from gateway_slurm.testing.line import Line, line_to
from gateway_slurm.testing.loginnode import USER, LoginNode, free_port, login_node, make_key

__all__ = ["USER", "Line", "LoginNode", "free_port", "line_to", "login_node", "make_key", "sessions"]


def sessions(node: LoginNode) -> list[psutil.Process]:
    """What runs on the login node for those who have logged in."""
    assert node._process is not None
    return [one for one in psutil.Process(node._process.pid).children(recursive=True) if one.is_running()]
