"""The package's interface: three names, imported when they are used, and the old name of the kernel manager."""

from __future__ import annotations

import importlib
import importlib.metadata
import subprocess
import sys
import warnings

import pytest
from traitlets.utils.importstring import import_item

import gateway_slurm

CLASSES = ("SlurmMappingKernelManager", "SlurmProvisioner", "SlurmService")
OLD_NAME = "gateway_slurm.gateway.kernels.SlurmMappingKernelManager"


def test_importing_the_package_imports_nothing_else():
    """Neither a module of its own nor another package: a tool that reads the version pays for no more."""
    code = "import sys; before = set(sys.modules); import gateway_slurm; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-S", "-c", code], env={"PYTHONPATH": gateway_slurm.__path__[0] + "/.."},
                          capture_output=True, text=True, check=True)  # fmt: skip
    new = {name.split(".")[0] for name in done.stdout.split()}
    assert new - set(sys.stdlib_module_names) == {"gateway_slurm"}
    assert "gateway_slurm." not in done.stdout


@pytest.mark.parametrize("name", CLASSES)
def test_a_public_name_is_the_class(name):
    """By attribute, by import, and as Jupyter's settings name classes."""
    found = getattr(gateway_slurm, name)
    assert found.__name__ == name
    assert import_item(f"gateway_slurm.{name}") is found
    assert name in dir(gateway_slurm)
    assert name in gateway_slurm.__all__


def test_another_name_is_an_attribute_error():
    """As with any module."""
    with pytest.raises(AttributeError, match="module 'gateway_slurm' has no attribute 'SlurmGateway'"):
        _ = gateway_slurm.SlurmGateway


def test_the_old_name_works_and_names_the_new_one():
    """As ServerApp.kernel_manager_class of the last release named the kernel manager."""
    with pytest.warns(DeprecationWarning, match=r"is now gateway_slurm\.SlurmMappingKernelManager"):
        found = import_item(OLD_NAME)
    assert found is gateway_slurm.SlurmMappingKernelManager


def test_the_new_name_warns_of_nothing():
    """The warning is for the old name only."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        assert import_item("gateway_slurm.SlurmMappingKernelManager") is gateway_slurm.SlurmMappingKernelManager


def test_the_old_module_has_no_other_name():
    """As with any module."""
    module = importlib.import_module("gateway_slurm.gateway.kernels")
    with pytest.raises(AttributeError, match="has no attribute 'ready_of'"):
        _ = module.ready_of


@pytest.mark.parametrize("module", ["gateway_slurm.allocation", "gateway_slurm.heldkernel", "gateway_slurm.asuser"])
def test_other_inner_modules_that_moved_are_not_found(module):
    """Python's own error names the module; inner modules were no interface."""
    with pytest.raises(ModuleNotFoundError, match=f"No module named '{module}'"):
        importlib.import_module(module)


def test_the_entry_point_is_the_public_provisioner():
    """``slurm-provisioner`` of existing kernel.json files."""
    points = importlib.metadata.entry_points(group="jupyter_client.kernel_provisioners")
    (point,) = [point for point in points if point.name == "slurm-provisioner"]
    assert point.value == "gateway_slurm.provisioner:SlurmProvisioner"
    assert point.load() is gateway_slurm.SlurmProvisioner
