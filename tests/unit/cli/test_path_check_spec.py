"""What the doctor's walk asks for: a kernelspec's fields, the options over them, and what is left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gateway_slurm.cli.doctor.spec import MINUTES, PROVISIONER, Asked, OneSpec
from gateway_slurm.errors import RequestError
from gateway_slurm.slurm.commands import About, Partition

CLUSTER = About("22.05.8", (Partition("batch"), Partition("devel", True)))


@pytest.fixture(autouse=True)
def kernels(tmp_path, monkeypatch) -> Path:
    """Jupyter's data directories, with one kernelspec that runs here."""
    for name in ("JUPYTER_PATH", "JUPYTER_DATA_DIR", "HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    install(tmp_path, "plain")
    return tmp_path


def install(directory: Path, name: str, **config: object) -> None:
    """Write a kernelspec; with request fields one of ours."""
    provisioner = {"provisioner_name": PROVISIONER, "config": config}
    metadata = {"kernel_provisioner": provisioner, "supported_encryption": ["curve"]} if config else {}
    spec = {"display_name": name, "language": "python", "argv": ["x"], "metadata": metadata}
    path = directory / "kernels" / name / "kernel.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(spec))


def test_a_kernelspecs_fields_are_taken_but_for_what_would_make_the_job_somebody_elses(kernels):
    """Nor its time limit: a short job does; what else the kernelspec says stays."""
    config = {"project": "p", "partition": "a", "nodes": "2", "runtime": "600", "kernel_argv": ["k"], "qos": "q"}
    install(kernels, "ours", **config, jobid="12", share=True, isolate=True, keep_allocation=True)
    specs = OneSpec(Asked("ours", {"partition": "b"}), ["python3"])
    left = {**config, "partition": "b", "runtime": MINUTES}
    assert specs.fields == left
    made = specs.get_kernel_spec(specs.name)
    assert made.metadata["supported_encryption"] == ["curve"]
    assert made.metadata["kernel_provisioner"]["config"] == left
    assert specs.get_kernel_spec("plain").argv == ["x"]


@pytest.mark.parametrize(("option", "value"), [("runtime", "30"), ("time", "1:00:00")])
def test_a_time_limit_that_is_given_is_taken(kernels, option, value):
    """In either form."""
    install(kernels, "ours", project="p", partition="a", time="1-0", runtime=5, kernel_argv=["k"])
    assert OneSpec(Asked("ours", {option: value}), []).fields[option] == value


def test_without_a_kernelspec_it_is_ipykernel_of_the_launchers_python_in_the_default_partition():
    """As soon as it is known which that is."""
    specs = OneSpec(Asked(fields={"project": "p"}), ["~/env/bin/python", "python3"])
    assert specs.fields["kernel_argv"][-2:] == ["~/env/bin/python", "python3"]
    specs.complete(CLUSTER)
    assert specs.fields["partition"] == "devel"
    named = OneSpec(Asked(fields={"project": "p", "partition": "batch"}), ["python3"])
    named.complete(CLUSTER)
    assert named.fields["partition"] == "batch"
    with pytest.raises(RequestError, match="no default; it has x, y"):
        OneSpec(Asked(fields={"project": "p"}), ["p"]).complete(About("", (Partition("x"), Partition("y"))))


def test_a_kernel_may_be_wrapped():
    """One that runs on the server's machine by itself."""
    assert "kernel_argv" not in OneSpec(Asked(fields={"project": "p", "kernel_name": "plain"}), []).fields


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (Asked("nosuch"), "there is no kernelspec 'nosuch'.*are: none"),
        (Asked("/no/such/directory"), "there is no kernelspec '/no/such/directory'"),
        (Asked("plain"), "runs on this machine.*--kernel-name"),
        (Asked(), "no kernelspec with slurm-provisioner is installed"),
        (Asked(fields={"project": "p", "nodes": "many"}), "'nodes'"),
        (Asked(fields={"project": "-p"}), "'project'"),
    ],
)
def test_what_cannot_be_asked_for_is_told(asked, words):
    """Before anything is."""
    with pytest.raises(RequestError, match=words):
        OneSpec(asked, ["python3"])
