"""Hostile values in a request, in the environment and in the kernel's command: carried or refused, never run."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from jupyter_client import KernelManager

from gateway_slurm.errors import GatewaySlurmError, RequestError
from gateway_slurm.request import FIELDS
from helpers import kernel_clients
from helpers.failing_starts import nothing_left, script, spec, start_error
from helpers.kernel_clients import execute, running_kernel
from helpers.private_slurm import jobs_of


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """A file that a shell would make if it ever read one of the values below; it is not there at the end."""
    path = tmp_path / "pwned"
    yield path
    assert not path.exists()


def hostile(marker: Path) -> dict[str, str]:
    """What has broken other launchers: each would touch ``marker`` in a shell, or be an option, or too much."""
    return {
        "substitution": f"$(touch {marker})",
        "backticks": f"`touch {marker}`",
        "quotes": f"'\"; touch {marker}; '\"",
        "lines": f"a\ntouch {marker}\n#SBATCH --output={marker}\n",
        "option": f"--output={marker}",
        "here": f"PROGRAM_\nEOF\ntouch {marker}\n",
        "unicode": "ключ\u202e\U0001f600\u0000\ud800",
        "format": "{0.__class__} %s %(x)s {connection_file}",
        "long": "x" * 100_000,
    }


KINDS = list(hostile(Path("/nowhere")))


@pytest.mark.parametrize("field", [field.name for field in FIELDS])
def test_a_hostile_field_is_refused_or_data(service, cluster, kernelspecs, marker, field):
    """Every request field takes what it is for; all else is refused before Slurm is asked, and never run."""
    for kind, value in hostile(marker).items():
        fields = {"kernel_argv": None, field: value} if field == "kernel_name" else {field: value}
        if field == "kernel_language":
            # Free text that only frontends show: only the launcher gets it, as data.
            fields["partition"] = "nosuch"
        error, _seconds = start_error(spec(kernelspecs, **fields))
        assert isinstance(error, GatewaySlurmError), kind
        assert len(str(error)) < 2000, kind
        if field != "kernel_language":
            assert isinstance(error, RequestError), kind
            assert kernel_clients.commands_run(service) == 0
    assert jobs_of(cluster) == []


WRONG = {"list": [], "object": {}, "lists": [[]], "full": {"a": 1}, "huge": 10**5000, "nan": float("nan")}


@pytest.mark.parametrize("value", WRONG.values(), ids=WRONG)
def test_a_field_of_a_wrong_type_is_refused(service, cluster, kernelspecs, value):
    """A list, an object, a huge number: an error that names the field, for each field."""
    for field in FIELDS:
        manager = KernelManager(kernel_name="slurm")
        config = manager.kernel_spec.metadata["kernel_provisioner"]["config"]
        config.pop("kernel_argv" if field.name == "kernel_name" else "", None)
        config[field.name] = value
        with pytest.raises(RequestError) as caught:
            manager.start_kernel()
        assert field.name in str(caught.value)
    assert kernel_clients.commands_run(service) == 0


def carried(marker: Path) -> dict[str, str]:
    """The hostile values that a process's environment and command can hold."""
    values = hostile(marker)
    values["unicode"] = "ключ\u202e\U0001f600"
    return values


def test_hostile_arguments_reach_the_kernel_as_they_are(service, cluster, kernelspecs, marker):
    """Every item of kernel_argv arrives byte for byte; only the connection file's placeholder is replaced."""
    values = carried(marker)
    del values["format"]
    code = "import sys; extra = sys.argv[3:]; del sys.argv[3:]; import runpy; import builtins; "
    code += "builtins.extra = extra; runpy.run_module('ipykernel_launcher', run_name='__main__', alter_sys=True)"
    argv = [sys.executable, "-c", code, "-f", "{connection_file}", *values.values()]
    with running_kernel(spec(kernelspecs, kernel_argv=argv)) as (_manager, client):
        assert json.loads(execute(client, "import json; print(json.dumps(extra))")) == list(values.values())


def test_hostile_variables_reach_the_kernel_as_they_are(service, cluster, kernel_name, marker):
    """Values, and names that are no identifiers, arrive byte for byte and are read by no shell."""
    values = {f"GST_{kind}": value for kind, value in carried(marker).items()}
    names = {
        f"GST $(touch {marker})": "1",
        f"GST;touch {marker}": "2",
        "GST_func%%": f"() {{ touch {marker}; }}",
        "GST\nLINE": "3",
        "BASH_ENV": f"$(touch {marker})",
        "ENV": f"$(touch {marker})",
        "GST_shock": f"() {{ :; }}; touch {marker}",
    }
    sent = {**values, **names}
    with running_kernel(kernel_name, env={**os.environ, **sent}) as (_manager, client):
        code = f"import json, os; print(json.dumps({{n: os.environ.get(n) for n in {list(sent)!r}}}))"
        assert json.loads(execute(client, code)) == sent


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"GST_NUL": "a\0b"}, "'GST_NUL'"),
        ({"GST_LONG": "x" * 200_000}, "'GST_LONG'"),
        ({f"GST_{n}": "x" * 100_000 for n in range(12)}, "1048576"),
    ],
    ids=["nul", "long", "much"],
)
def test_variables_that_no_process_can_have_are_refused(service, cluster, env, words):
    """A NUL, a value over Linux's limit, too much in all: an error that names it, and no job."""
    error, _seconds = start_error("slurm", env=env)
    assert isinstance(error, RequestError)
    assert words in str(error)
    assert kernel_clients.commands_run(service) == 0


@pytest.mark.parametrize("kind", ["substitution", "backticks", "quotes", "unicode"])
def test_a_directory_with_a_hostile_name_is_a_directory(service, cluster, tmp_path, marker, kind):
    """The kernel runs in a directory whatever its name."""
    directory = tmp_path / carried(marker)[kind].replace("/", "_")
    directory.mkdir()
    with running_kernel("slurm", cwd=str(directory)) as (_manager, client):
        assert json.loads(execute(client, "import json, os; print(json.dumps(os.getcwd()))")) == str(directory)


@pytest.mark.parametrize("kind", KINDS)
def test_a_hostile_directory_that_is_not_there_is_only_a_hint(service, cluster, marker, kind):
    """A client's working directory of any text starts a kernel at home, with a reason that the user can read."""
    with running_kernel("slurm", cwd=hostile(marker)[kind]) as (manager, client):
        assert execute(client, "import os; print(os.getcwd())") == os.environ["HOME"]
        assert 0 < len(manager.provisioner.directory["why"]) < 5000


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "unicode"])
def test_a_hostile_program_is_not_run_by_a_shell(service, cluster, kernelspecs, marker, kind):
    """The first item of kernel_argv is a program's name, and none of these is there."""
    error, _seconds = start_error(spec(kernelspecs, kernel_argv=[hostile(marker)[kind]]))
    assert isinstance(error, GatewaySlurmError)
    assert len(str(error)) < 5000
    assert nothing_left(cluster)


def test_a_hostile_project_never_reaches_the_account_hook(admin_settings, cluster, kernelspecs, marker, tmp_path):
    """The hook gets the project as one argument, and only names that are names."""
    hook = script(tmp_path / "hook", f'#!/bin/sh\ntouch {tmp_path}/asked\neval "$1"\n')
    admin_settings(account_command=[hook, "{project}"])
    for value in hostile(marker).values():
        error, _seconds = start_error(spec(kernelspecs, project=value))
        assert isinstance(error, RequestError)
    assert not (tmp_path / "asked").exists()
