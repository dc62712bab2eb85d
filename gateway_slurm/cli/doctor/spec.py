"""What the doctor's walk starts: a kernelspec of the user's, or one made of options, as kernels are asked for."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from jupyter_client.kernelspec import KernelSpec, KernelSpecManager, NoSuchKernel

from gateway_slurm.errors import RequestError
from gateway_slurm.request import FIELDS, parse_request
from gateway_slurm.slurm.commands import About

PROVISIONER: Final = "slurm-provisioner"
OPTIONS: Final = tuple(
    each.name
    for each in FIELDS
    if each.name not in ("jobid", "share", "isolate", "keep_allocation", "kernel_argv", "kernel_language")
)
"""Request fields that are options of the command; the others would make the walk's job somebody else's, too."""
MINUTES: Final = 5
"""The job's time limit, where none is given: short ones fit in between others."""
_NAME: Final = "walk"
# ipykernel of the Python that the job script takes for the launcher.
_KERNEL: Final = """\
connection=$1
shift
for python; do
  case $python in "~/"*) python=$HOME/${python#"~/"};; esac
  if command -v "$python" >/dev/null 2>&1; then exec "$python" -m ipykernel_launcher -f "$connection"; fi
done
echo "none of these is here: $*" >&2
exit 127
"""


@dataclass
class Asked:
    """The options: ``fields`` are request fields, ``user`` whose kernel it is to be, ``wait`` is in seconds."""

    kernelspec: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)
    user: str = ""
    wait: float = 120.0


class OneSpec(KernelSpecManager):
    """Has the walk's kernelspec beside the user's, under ``name``."""

    def __init__(self, asked: Asked, pythons: Sequence[str]) -> None:
        super().__init__()
        self.name, self.shown, self._spec = _NAME, *self._find(asked)
        self.language = self._spec.language.lower()
        self.fields = self._spec.metadata["kernel_provisioner"]["config"]
        if not self.fields.get("kernel_argv") and not self.fields.get("kernel_name"):
            self.fields["kernel_argv"] = ["/bin/sh", "-c", _KERNEL, "sh", "{connection_file}", *pythons]
        # The cluster may have a default; all the rest can be checked now.
        self._check({"partition": "default", **self.fields})

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        """As the base class has it."""
        return self._spec if kernel_name == _NAME else super().get_kernel_spec(kernel_name)

    def complete(self, about: About) -> None:
        """Name the cluster's default partition, where none is asked for. Raises RequestError."""
        if self.fields.get("partition"):
            return
        known = ", ".join(map(str, about.partitions)) or "none"
        if about.default_partition is None:
            raise RequestError(f"no partition is asked for, and Slurm tells of no default; it has {known}")
        self.fields["partition"] = about.default_partition

    def _check(self, config: Mapping[str, Any]) -> None:
        parse_request(config, spec_language=self._spec.language)

    def _find(self, asked: Asked) -> tuple[str, KernelSpec]:
        """What to call it, and the kernelspec; with neither a kernelspec nor a project, the first of the user's."""
        name = asked.kernelspec
        if not name and "project" not in asked.fields:
            name = next(iter(self._slurms()), "")
            if not name:
                raise RequestError(
                    f"no kernelspec with {PROVISIONER} is installed: name one by --kernelspec (a name, or the path of "
                    "its directory), or what a job needs by --project and --partition"
                )
        spec = self._read(name) if name else KernelSpec(display_name="walk", language="python", metadata={})
        given = dict(spec.metadata.get("kernel_provisioner", {}).get("config", {}))
        found = {key: value for key, value in given.items() if key in OPTIONS or key.startswith("kernel_")}
        if not {"runtime", "time"} & set(asked.fields):
            found.pop("time", None)
            found["runtime"] = MINUTES
        found = {"nodes": 1, **found, **asked.fields}
        metadata = {**spec.metadata, "kernel_provisioner": {"provisioner_name": PROVISIONER, "config": found}}
        made = KernelSpec(**{**spec.to_dict(), "resource_dir": spec.resource_dir, "metadata": metadata})
        return (f"kernelspec {name}" if name else "ipykernel of the launcher's Python"), made

    def _slurms(self) -> list[str]:
        found = self.get_all_specs()
        return sorted(name for name, each in found.items() if _is_slurms(each["spec"].get("metadata", {})))

    def _read(self, name: str) -> KernelSpec:
        try:
            spec = KernelSpec.from_resource_dir(name) if os.sep in name else super().get_kernel_spec(name)
        except (NoSuchKernel, OSError, ValueError) as error:
            known = ", ".join(self._slurms()) or "none"
            raise RequestError(
                f"there is no kernelspec {name!r} ({type(error).__name__}); those with {PROVISIONER} are: {known}"
            ) from error
        if not _is_slurms(spec.metadata):
            raise RequestError(
                f"kernelspec {name!r} runs on this machine, not by {PROVISIONER}; to have it wrapped, name it by "
                "--kernel-name, with --project and --partition"
            )
        return spec


def _is_slurms(metadata: Any) -> bool:
    provisioner = metadata.get("kernel_provisioner") if isinstance(metadata, dict) else None
    return isinstance(provisioner, dict) and provisioner.get("provisioner_name") == PROVISIONER
