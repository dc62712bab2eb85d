"""The submission of a job in each version of the REST interface, and the choice of the version."""

from __future__ import annotations

import os
import pwd
import subprocess
from typing import Any

import pytest

from gateway_slurm.errors import SlurmUnavailable, SubmitRefused
from gateway_slurm.slurm.model import JobSpec
from gateway_slurm.slurm.rest.versions import (
    VERSIONS,
    newest_known,
    offered_versions,
    submission,
    with_login_environment,
)

SPEC = JobSpec(
    name="n é",
    script="#!/bin/sh\ntrue\n",
    comment="c\n;x",
    partition="batch",
    account="demo",
    nodes=2,
    time="1-00:30",
    gres=["gpu:a100:1", "shard:2"],
    reservation="r",
    qos="q",
    cpus=3,
    memory="2G",
    constraint="a&b",
    nodelist="c1",
    signal_seconds=600,
    env={"TOKEN": "a=b\nc"},
)
BY_NAME = {version.name: version for version in VERSIONS}
# What every version has in the same form.
COMMON = {
    "name": "n é",
    "comment": "c\n;x",
    "current_working_directory": "/",
    "standard_output": "/dev/null",
    "standard_error": "/dev/null",
    "partition": "batch",
    "account": "demo",
    "qos": "q",
    "reservation": "r",
    "constraints": "a&b",
    "nodes": "2",
    "tasks": 2,
    "tasks_per_node": 1,
    "cpus_per_task": 3,
}
PATH = "/usr/local/bin:/usr/bin:/bin"


def struct(number: int) -> dict[str, Any]:
    """A number in the shape of v0.0.39 and later."""
    return {"set": True, "infinite": False, "number": number}


def test_a_job_for_slurm_22_05() -> None:
    """v0.0.38 has sbatch's options, the environment as an object, and the script beside the job."""
    body = submission(SPEC, BY_NAME["v0.0.38"])
    assert body.keys() == {"script", "job"}
    assert body["job"] == {
        **COMMON,
        "environment": {"PATH": PATH, "TOKEN": "a=b\nc"},
        "no_requeue": True,
        "nodelist": "c1",
        "gres": "gpu:a100:1,shard:2",
        "memory_per_node": "2048",
        "time_limit": "1-00:30",
    }


@pytest.mark.parametrize("name", [version.name for version in VERSIONS if version.name != "v0.0.38"])
def test_a_job_for_later_versions(name: str) -> None:
    """They have the fields of the API's structure, the environment as a list, and the script in the job."""
    body = submission(SPEC, BY_NAME[name])
    prefix = "gres:" if name == "v0.0.39" else "gres/"
    script = body["job"].pop("script")
    assert script.startswith("#!/bin/sh\nif [ -z")
    assert body == {
        "job": {
            **COMMON,
            "environment": [f"PATH={PATH}", "TOKEN=a=b\nc"],
            "requeue": False,
            "required_nodes": ["c1"],
            "tres_per_node": f"{prefix}gpu:a100:1,{prefix}shard:2",
            "memory_per_node": struct(2048),
            "time_limit": struct(24 * 60 + 30),
            "kill_warning_signal": "USR1",
            "kill_warning_delay": struct(600),
            "kill_warning_flags": ["BATCH_JOB"],
        }
    }


@pytest.mark.parametrize("version", VERSIONS, ids=lambda version: version.name)
def test_what_is_not_asked_for_is_not_named(version: Any) -> None:
    """Slurm would take an empty field for a request."""
    job = submission(JobSpec(name="n", script="#!/bin/sh\n"), version)["job"]
    assert None not in job.values()
    assert "partition" not in job
    assert "time_limit" not in job
    assert "nodes" not in job


def test_no_time_limit() -> None:
    """UNLIMITED is infinite, which differs from no value."""
    unlimited = JobSpec(name="n", script="#!/bin/sh\n", time="UNLIMITED")
    assert submission(unlimited, BY_NAME["v0.0.38"])["job"]["time_limit"] == "UNLIMITED"
    assert submission(unlimited, BY_NAME["v0.0.44"])["job"]["time_limit"]["infinite"] is True


def test_options_of_sbatchs_own_are_refused() -> None:
    """An option that only sbatch understands is not dropped silently."""
    with pytest.raises(SubmitRefused, match="--wckey=x"):
        submission(JobSpec(name="n", script="#!/bin/sh\n", extra=["--wckey=x"]), VERSIONS[0])


def test_the_newest_version_of_both_sides_is_chosen() -> None:
    """A newer version that the server also offers does no harm."""
    paths = [f"/slurm/v0.0.{number}/job/submit" for number in (40, 41, 99)]
    other = ["/slurmdb/v0.0.42/jobs/", "/slurm/v0.0.42/jobs/", "/x"]
    served = offered_versions({"paths": dict.fromkeys([*paths, *other])})
    assert served == ["v0.0.40", "v0.0.41", "v0.0.99"]
    assert newest_known(served).name == "v0.0.41"
    served = offered_versions({"paths": {"/slurm/v0.0.9/job/submit/": 1, "/slurm/v0.0.38/job/submit": 1}})
    assert served[-1] == "v0.0.38"


@pytest.mark.parametrize("document", [{}, {"paths": []}, {"paths": {"/slurm/v0.0.99/job/submit": {}}}])
def test_no_version_of_both_sides(document: dict[str, Any]) -> None:
    """The error names the versions that the server offers."""
    with pytest.raises(SlurmUnavailable, match=r"v0\.0\.38 to v0\.0\.\d+"):
        newest_known(offered_versions(document))


@pytest.mark.parametrize("shell", ["/bin/sh", "/bin/bash"])
def test_the_login_environment(shell: str) -> None:
    """A job without HOME gets the values of the node's user database; a job with HOME is left unchanged."""
    script = with_login_environment('#!/bin/sh\necho "$HOME|$USER|$LOGNAME|$SHELL"\n')
    told = subprocess.run(
        [shell], input=script, env={"PATH": PATH}, check=True, capture_output=True, text=True
    ).stdout.strip()
    entry = pwd.getpwuid(os.getuid())
    assert told == f"{entry.pw_dir}|{entry.pw_name}|{entry.pw_name}|{entry.pw_shell}"
    kept = subprocess.run(
        [shell], input=script, env={"PATH": PATH, "HOME": "/x", "USER": "u"}, check=True, capture_output=True, text=True
    ).stdout
    assert kept.startswith("/x|u|")


def test_a_script_without_an_interpreter_is_left_to_slurm() -> None:
    """Slurm refuses it; it is not changed."""
    assert with_login_environment("no script") == "no script"
