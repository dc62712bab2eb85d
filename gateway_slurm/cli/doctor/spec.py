"""The kernelspec that the path check starts: one of the user's, changed by the options, or one made of options."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from jupyter_client.kernelspec import KernelSpec, KernelSpecManager, NoSuchKernel

from gateway_slurm.errors import RequestError
from gateway_slurm.request import FIELDS, parse_request
from gateway_slurm.slurm.model import ClusterInfo

PROVISIONER: Final = "slurm-provisioner"
OPTIONS: Final = tuple(
    field.name
    for field in FIELDS
    if field.name not in ("jobid", "share", "isolate", "keep_allocation", "kernel_argv", "kernel_language")
)
"""Request fields that are options of the command; the others would let other kernels use the check's job."""
MINUTES: Final = 5
"""The job's time limit, where none is given: Slurm can fit a short job in between others."""
_NAME: Final = "path-check"
# Starts ipykernel with the first of the launcher's Pythons that exists on the node.
_KERNEL: Final = """\
connection=$1
shift
for python; do
  case $python in "~/"*) python=$HOME/${python#"~/"};; esac
  if command -v "$python" >/dev/null 2>&1; then exec "$python" -m ipykernel_launcher -f "$connection"; fi
done
echo "none of these Pythons exists on this node: $*" >&2
exit 127
"""


@dataclass
class CheckOptions:
    """The path check's options: ``fields`` are request fields, ``user`` owns the kernel, ``wait`` is in seconds."""

    kernelspec: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)
    user: str = ""
    wait: float = 120.0


class CheckedKernelSpecs(KernelSpecManager):
    """The user's kernelspecs, and under ``name`` the one that the path check starts.

    Raises RequestError for a kernelspec or an option that is not valid.
    """

    def __init__(self, options: CheckOptions, pythons: Sequence[str]) -> None:
        super().__init__()
        self.name = _NAME
        self.description, self._spec = self._make(options)
        self.language = self._spec.language.lower()
        self.fields = self._spec.metadata["kernel_provisioner"]["config"]
        if not self.fields.get("kernel_argv") and not self.fields.get("kernel_name"):
            self.fields["kernel_argv"] = ["/bin/sh", "-c", _KERNEL, "sh", "{connection_file}", *pythons]
        # Slurm may have a default partition; everything else can be checked now.
        parse_request({"partition": "default", **self.fields}, spec_language=self._spec.language)

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        """Return a kernelspec by name, as the base class does."""
        return self._spec if kernel_name == _NAME else super().get_kernel_spec(kernel_name)

    def complete(self, about: ClusterInfo) -> None:
        """Fill in Slurm's default partition, where no partition is named. Raises RequestError if there is none."""
        if self.fields.get("partition"):
            return
        known = ", ".join(map(str, about.partitions)) or "none"
        if about.default_partition is None:
            raise RequestError(f"no partition is named, and Slurm has no default one; its partitions are {known}")
        self.fields["partition"] = about.default_partition

    def _make(self, options: CheckOptions) -> tuple[str, KernelSpec]:
        """A description, and the kernelspec: the user's first one where neither a kernelspec nor a project is named."""
        name = options.kernelspec
        if not name and "project" not in options.fields:
            name = next(iter(self._provisioned()), "")
            if not name:
                raise RequestError(
                    f"no kernelspec with {PROVISIONER} is installed: give --kernelspec (a name, or the path of its "
                    "directory), or --project and --partition"
                )
        spec = self._read(name) if name else KernelSpec(display_name=_NAME, language="python", metadata={})
        given = dict(spec.metadata.get("kernel_provisioner", {}).get("config", {}))
        config = {key: value for key, value in given.items() if key in OPTIONS or key.startswith("kernel_")}
        if not {"runtime", "time"} & set(options.fields):
            config.pop("time", None)
            config["runtime"] = MINUTES
        config = {"nodes": 1, **config, **options.fields}
        metadata = {**spec.metadata, "kernel_provisioner": {"provisioner_name": PROVISIONER, "config": config}}
        made = KernelSpec(**{**spec.to_dict(), "resource_dir": spec.resource_dir, "metadata": metadata})
        return (f"kernelspec {name}" if name else "ipykernel of the launcher's Python"), made

    def _provisioned(self) -> list[str]:
        """The names of the user's kernelspecs with the provisioner."""
        specs = self.get_all_specs()
        return sorted(name for name, item in specs.items() if _is_provisioned(item["spec"].get("metadata", {})))

    def _read(self, name: str) -> KernelSpec:
        try:
            spec = KernelSpec.from_resource_dir(name) if os.sep in name else super().get_kernel_spec(name)
        except (NoSuchKernel, OSError, ValueError) as error:
            known = ", ".join(self._provisioned()) or "none"
            raise RequestError(
                f"there is no kernelspec {name!r} ({type(error).__name__}); those with {PROVISIONER} are: {known}"
            ) from error
        if not _is_provisioned(spec.metadata):
            raise RequestError(
                f"kernelspec {name!r} does not use {PROVISIONER} and runs on this machine; to run it on a node, give "
                "--kernel-name with --project and --partition"
            )
        return spec


def _is_provisioned(metadata: Any) -> bool:
    provisioner = metadata.get("kernel_provisioner") if isinstance(metadata, dict) else None
    return isinstance(provisioner, dict) and provisioner.get("provisioner_name") == PROVISIONER
