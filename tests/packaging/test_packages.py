"""What people install: the built wheel and sdist, and the kernelspecs that come with them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from gateway_slurm.request import parse_request
from helpers.kernel_clients import JOB, execute, jobid_of, running_kernel

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "kernelspecs").glob("*/*/kernel.json"))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The directory with sdist and wheel, the wheel built from the sdist."""
    directory = tmp_path_factory.mktemp("dist")
    argv = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(directory), str(ROOT)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False, cwd=directory)
    assert done.returncode == 0, done.stdout + done.stderr
    return directory


def sources(*directories):
    """The Python sources and kernelspecs of the repository that a package has to carry."""
    patterns = ("**/*.py", "**/kernel.json", "**/py.typed")
    found = {path for name in directories for pattern in patterns for path in (ROOT / name).glob(pattern)}
    return {str(path.relative_to(ROOT)) for path in found}


def test_the_wheel_carries_launchers_and_kernelspecs(built):
    """Every module, launcher and kernelspec is in the wheel, inside the package, and nothing beside it."""
    (wheel,) = built.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    inside = {f"gateway_slurm/{name}" for name in sources("launchers", "kernelspecs")}
    assert sources("gateway_slurm") | inside <= names
    assert {name.split("/")[0] for name in names} == {"gateway_slurm"}


def test_the_sdist_carries_what_the_tests_need(built):
    """Sources, launchers, kernelspecs, tests and documentation are in the sdist."""
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert sources("gateway_slurm", "launchers", "kernelspecs", "tests") <= names
    assert {"README.md", "LICENSE", "pyproject.toml", "Makefile"} <= names


@pytest.fixture
def installed(built, tmp_path):
    """The Python of a new venv with the wheel; what the wheel needs comes from this environment."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True, timeout=60)
    python = venv / "bin" / "python"
    (wheel,) = built.glob("*.whl")
    argv = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet", wheel]
    subprocess.run(argv, check=True, timeout=60)
    # A path in a .pth file brings no .pth files of its own: not the editable install of this repository.
    (site,) = (venv / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


SCRIPT = """
import sys
from pathlib import Path
import gateway_slurm
from gateway_slurm.link.program import launchers_directory
from jupyter_client import KernelManager

for place in (Path(gateway_slurm.__file__), launchers_directory()):
    assert place.is_relative_to(sys.prefix), place
manager = KernelManager(kernel_name=sys.argv[1])
manager.start_kernel()
client = manager.client()
client.start_channels()
client.wait_for_ready(timeout=60)
client.execute_interactive("print(6 * 7)", timeout=60)
client.stop_channels()
manager.shutdown_kernel()
"""


def test_a_kernel_starts_from_the_installed_wheel(cluster, kernelspecs, installed, tmp_path, kernel_name):
    """With the wheel in an environment of its own, and no repository in reach, a kernel runs on the cluster."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    argv = [installed, "-c", SCRIPT, kernel_name]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "42"


def test_the_helper_is_installed_as_a_program(installed):
    """The program that sudo is to start is executable, and where ``as_user_command`` has it by default."""
    code = "from gateway_slurm.service import SlurmService; print(SlurmService().as_user_command[-1])"
    said = subprocess.run([installed, "-c", code], capture_output=True, text=True, timeout=60, check=True, cwd="/")
    helper = Path(said.stdout.strip())
    assert helper.is_relative_to(installed.parents[1])
    assert os.access(helper, os.X_OK)


@pytest.mark.parametrize("path", SHIPPED, ids=[f"{path.parts[-3]}-{path.parts[-2]}" for path in SHIPPED])
def test_a_shipped_kernelspec_starts(service, kernelspecs, path):
    """Each kernelspec is valid as it is, and starts a kernel with the GPUs that it promises."""
    spec = json.loads(path.read_text())
    request = parse_request(spec["metadata"]["kernel_provisioner"]["config"])
    shutil.copytree(path.parent, kernelspecs / "kernels" / "shipped")
    with running_kernel("shipped") as (manager, client):
        assert execute(client, JOB) == jobid_of(manager)
        gpus = execute(client, "import os; print(os.environ.get('CUDA_VISIBLE_DEVICES', ''))")
        assert len([gpu for gpu in gpus.split(",") if gpu]) == request.gpus


def test_every_kernelspec_is_described():
    """kernelspecs/README.md names each of them."""
    text = (ROOT / "kernelspecs" / "README.md").read_text()
    assert SHIPPED
    for path in SHIPPED:
        assert f"`{path.parts[-3]}/{path.parts[-2]}`" in text
