"""The kernelspec of the doctor's path check: request fields, the options over them, and the fields left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gateway_slurm.cli.doctor.spec import MINUTES, PROVISIONER, CheckedKernelSpecs, CheckOptions
from gateway_slurm.errors import RequestError
from gateway_slurm.slurm.model import ClusterInfo, Partition

CLUSTER = ClusterInfo("22.05.8", (Partition("batch"), Partition("devel", True)))


@pytest.fixture(autouse=True)
def kernels(tmp_path, monkeypatch) -> Path:
    """Jupyter's data directories, with one kernelspec that runs on this machine."""
    for name in ("JUPYTER_PATH", "JUPYTER_DATA_DIR", "HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    install(tmp_path, "plain")
    return tmp_path


def install(directory: Path, name: str, **config: object) -> None:
    """Write a kernelspec; with request fields it uses slurm-provisioner."""
    provisioner = {"provisioner_name": PROVISIONER, "config": config}
    metadata = {"kernel_provisioner": provisioner, "supported_encryption": ["curve"]} if config else {}
    spec = {"display_name": name, "language": "python", "argv": ["x"], "metadata": metadata}
    path = directory / "kernels" / name / "kernel.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(spec))


def test_a_kernelspecs_fields_are_used_except_those_that_would_share_the_job(kernels):
    """Nor is its time limit used, since a short job suffices. The rest of the kernelspec stays."""
    config = {"project": "p", "partition": "a", "nodes": "2", "runtime": "600", "kernel_argv": ["k"], "qos": "q"}
    install(kernels, "ours", **config, jobid="12", share=True, isolate=True, keep_allocation=True)
    specs = CheckedKernelSpecs(CheckOptions("ours", {"partition": "b"}), ["python3"])
    expected = {**config, "partition": "b", "runtime": MINUTES}
    assert specs.fields == expected
    made = specs.get_kernel_spec(specs.name)
    assert made.metadata["supported_encryption"] == ["curve"]
    assert made.metadata["kernel_provisioner"]["config"] == expected
    assert specs.get_kernel_spec("plain").argv == ["x"]


@pytest.mark.parametrize(("option", "value"), [("runtime", "30"), ("time", "1:00:00")])
def test_a_time_limit_that_is_given_is_used(kernels, option, value):
    """In minutes or in Slurm's format."""
    install(kernels, "ours", project="p", partition="a", time="1-0", runtime=5, kernel_argv=["k"])
    assert CheckedKernelSpecs(CheckOptions("ours", {option: value}), []).fields[option] == value


def test_without_a_kernelspec_ipykernel_of_the_launchers_python_starts_in_the_default_partition():
    """The default partition is all_nodes_taken in when Slurm has named it."""
    specs = CheckedKernelSpecs(CheckOptions(fields={"project": "p"}), ["~/env/bin/python", "python3"])
    assert specs.fields["kernel_argv"][-2:] == ["~/env/bin/python", "python3"]
    specs.complete(CLUSTER)
    assert specs.fields["partition"] == "devel"
    named = CheckedKernelSpecs(CheckOptions(fields={"project": "p", "partition": "batch"}), ["python3"])
    named.complete(CLUSTER)
    assert named.fields["partition"] == "batch"
    with pytest.raises(RequestError, match="no default one; its partitions are x, y"):
        CheckedKernelSpecs(CheckOptions(fields={"project": "p"}), ["p"]).complete(
            ClusterInfo("", (Partition("x"), Partition("y")))
        )


def test_another_kernelspec_can_be_wrapped():
    """One that would otherwise run on the server's machine."""
    assert (
        "kernel_argv"
        not in CheckedKernelSpecs(CheckOptions(fields={"project": "p", "kernel_name": "plain"}), []).fields
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (CheckOptions("nosuch"), "there is no kernelspec 'nosuch'.*are: none"),
        (CheckOptions("/no/such/directory"), "there is no kernelspec '/no/such/directory'"),
        (CheckOptions("plain"), "runs on this machine.*--kernel-name"),
        (CheckOptions(), "no kernelspec with slurm-provisioner is installed"),
        (CheckOptions(fields={"project": "p", "nodes": "many"}), "'nodes'"),
        (CheckOptions(fields={"project": "-p"}), "'project'"),
    ],
)
def test_invalid_options_are_reported(options, words):
    """Before a job is submitted."""
    with pytest.raises(RequestError, match=words):
        CheckedKernelSpecs(options, ["python3"])
