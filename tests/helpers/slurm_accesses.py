"""The three accesses to Slurm, so that one test runs by each: Slurm's commands here, a login node over SSH, slurmrestd.

The fixture ``access`` of conftest.py gives one of them. It needs a cluster with slurmrestd (``cluster_with_rest``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from gateway_slurm.service import SlurmService
from gateway_slurm.testing import PrivateCluster
from helpers import rest_cluster
from helpers.kernel_clients import CURVE, KERNEL_NAMES, install_kernelspec
from helpers.login_node import LoginNode

COMMANDS, SSH, REST = "commands", "ssh", "rest"
ACCESSES = (COMMANDS, SSH, REST)

# Decorators for tests of what is special to some of the accesses.
BY_COMMANDS = pytest.mark.parametrize("access", [COMMANDS], indirect=True)
BY_SSH = pytest.mark.parametrize("access", [SSH], indirect=True)
BY_REST = pytest.mark.parametrize("access", [REST], indirect=True)
# Slurm's commands with both transports, and the other accesses with one, since the transport does not depend on them.
EACH_ACCESS_AND_MODE = pytest.mark.parametrize(
    ("access", "mode"),
    [(COMMANDS, "tunnel"), (COMMANDS, "direct"), (SSH, "tunnel"), (REST, "tunnel")],
    indirect=["access"],
)


@dataclass(frozen=True)
class SlurmAccess:
    """An access to the cluster, and the settings by which a server uses it."""

    name: str
    settings: dict[str, object]
    _admin_settings: Callable[..., SlurmService]

    def service(self, **changed: object) -> SlurmService:
        """Write the admin's settings with these changes; return this process's service, which uses them.

        Servers in other processes use them as well.
        """
        return self._admin_settings(**{**self.settings, **changed})


def settings_of(name: str, cluster: PrivateCluster, node: LoginNode | None, directory: Path) -> dict[str, object]:
    """The settings of an access; ``node`` is the login node for SSH, ``directory`` takes the files for REST."""
    if name == COMMANDS:
        return {}
    if name == SSH:
        assert node is not None
        return {"relay": "always", **node.settings()}
    command = rest_cluster.mint_command(cluster, directory / "minted")
    return {"cluster": cluster.rest_url, "rest_token_command": command, "log_directory": str(directory / "logs")}


def keep_ipython_out_of_home(kernelspecs: Path) -> None:
    """Install both kernelspecs for REST, where a job's HOME is the one in the node's user database."""
    environment = {"env": {"IPYTHONDIR": str(kernelspecs.parent / "ipython-on-node")}}
    install_kernelspec(kernelspecs, KERNEL_NAMES["tunnel"], spec_overrides=environment)
    direct = {**environment, **CURVE}
    install_kernelspec(
        kernelspecs, KERNEL_NAMES["direct"], config_overrides={"connect": "direct"}, spec_overrides=direct
    )
