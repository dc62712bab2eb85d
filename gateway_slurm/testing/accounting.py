"""The accounts that a private cluster with slurmdbd begins with: pure. Source: sacctmgr(1)."""

from __future__ import annotations

DEMO_ACCOUNT = "demo"


def setup_commands(user: str) -> list[list[str]]:
    """Make the cluster, the account ``demo``, and ``user`` in it, before slurmctld asks for them."""
    sacctmgr = ["sacctmgr", "--immediate", "--quiet", "add"]
    return [
        [*sacctmgr, "cluster", "private"],
        [*sacctmgr, "account", DEMO_ACCOUNT, "Description=demonstration", "Organization=private"],
        [*sacctmgr, "user", user, f"Account={DEMO_ACCOUNT}", f"DefaultAccount={DEMO_ACCOUNT}"],
    ]
