"""The gateway's kernelspecs: each project's, and those installed for Jupyter, for whoever may see them."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from jupyter_client.kernelspec import KernelSpec, KernelSpecManager, NoSuchKernel
from jupyter_client.provisioning.factory import KernelProvisionerFactory
from jupyter_server.utils import url_path_join
from traitlets import Bool, CFloat, List, TraitError, Unicode, validate

from gateway_slurm.errors import ConfigError, NotAllowed
from gateway_slurm.gateway.jupyter_compat import spec_directory
from gateway_slurm.gateway.specs.catalog import PROVISIONER, Catalog, ServedSpec
from gateway_slurm.gateway.specs.limits import check_request, client_environment, client_fields, merge_fields
from gateway_slurm.gateway.specs.members import Membership, ask_accounts
from gateway_slurm.gateway.specs.projects import CLIENT_FIELDS, NEVER_CLIENT_FIELDS
from gateway_slurm.request import FIELDS
from gateway_slurm.service import SlurmService


class LocalKernel(NoSuchKernel):
    """The kernelspec is there, and would run its kernel on the gateway's own host."""

    def __str__(self) -> str:
        return _local_reason(self.name)


class NoSuchResource(NoSuchKernel):
    """The kernelspec is there, and has no such file for clients."""

    def __str__(self) -> str:
        return f"there is no {self.name[:200]!r}"


def _local_reason(name: str) -> str:
    return (
        f"the kernelspec {name!r} is not served: its kernels would run on the gateway's own host, as the gateway's "
        f"user, next to its tokens. Kernels here run on Slurm (provisioner_name: {PROVISIONER})"
    )


class GatewayKernelSpecManager(KernelSpecManager):
    """Serves ``<projects_root>/<project>/<name>/kernel.json`` as ``<project>.<name>``, and Jupyter's own kernelspecs.

    What takes a ``user`` looks at the disk and perhaps at group databases and Slurm, may wait, and may be
    called by any thread; a server calls it in a worker thread. Nothing is held open.
    """

    projects_root = Unicode(
        "",
        config=True,
        help="""Directory with a directory of kernelspecs for each project. Default: none, there are no
        projects.""",
    )
    serve_installed = Bool(
        True,
        config=True,
        help="Serve the kernelspecs that are installed on Jupyter's path, too, to everybody.",
    )
    allow_local = Bool(
        False,
        config=True,
        help="""Serve kernelspecs of other provisioners than Slurm's, too: their kernels run on the gateway's own
        host, as the gateway's user, and can read its tokens. For trying things out.""",
    )
    allowed_client_fields = List(
        Unicode(),
        list(CLIENT_FIELDS),
        config=True,
        help="""Request fields that clients may set by ``KERNEL_SLURM_<FIELD>``, for kernelspecs whose project
        does not say. Slurm's own limits hold besides.""",
    )
    allowed_envs = List(
        Unicode(),
        config=True,
        help="""Names (``LC_*`` for several) of a client's environment variables that its kernels get, besides
        ``KERNEL_*``.""",
    )
    membership_age = CFloat(
        300.0,
        config=True,
        help="""Seconds for which it is remembered who is in which Unix group or Slurm account.""",
    )

    @validate("allowed_client_fields")
    def _valid_client_fields(self, proposal: Any) -> list[str]:
        known = {field.name for field in FIELDS} - NEVER_CLIENT_FIELDS
        if wrong := [name for name in proposal["value"] if name not in known]:
            raise TraitError(
                f"GatewayKernelSpecManager.allowed_client_fields: clients cannot set {wrong}; "
                f"possible are {', '.join(sorted(known))}"
            )
        return list(proposal["value"])

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._catalog = Catalog(Path(self.projects_root).expanduser() if self.projects_root else None)
        self._membership = Membership(
            lambda: ask_accounts(SlurmService.instance(self.log).runner), max_age=self.membership_age
        )
        self._lock = threading.Lock()
        self._problems: list[str] = []

    # -- for a user ---------------------------------------------------------------------------------

    def specs_for(self, user: str, base_url: str | None = None) -> dict[str, dict[str, Any]]:
        """What ``GET /api/kernelspecs`` has as ``kernelspecs`` for this user; not to be changed by the caller."""
        seen = {name: served for name, served in self._all().items() if self._sees(served, user)}
        names = _display_names(list(seen.values()))
        return {name: self._model(served, names[name], base_url) for name, served in seen.items()}

    def model_for(self, name: str, user: str, base_url: str | None = None) -> dict[str, Any]:
        """What ``GET /api/kernelspecs/NAME`` has. Raises as ``spec_for``."""
        served = self._for(name, user)
        models = self.specs_for(user, base_url)
        return models.get(served.name) or self._model(served, _display_name(served), base_url)

    def spec_for(self, name: str, user: str) -> KernelSpec:
        """Raises NoSuchKernel for one that is not there for this user, NotAllowed for one that has another's name on
        it, or that is not served.
        """
        return self._for(name, user).kernel_spec(self.kernel_spec_class)

    def resource(self, name: str, path: str, user: str) -> bytes:
        """What is in a logo, kernel.js or kernel.css. Raises as ``spec_for``."""
        found = self._catalog.resource(self._for(name, user), path)
        if found is None:
            raise NoSuchResource(f"{name}/{path}")
        return found

    def request_fields(self, name: str, user: str, env: Mapping[str, object]) -> dict[str, object]:
        """The request fields of a kernel that ``user`` starts with this environment: the project's, the kernelspec's
        and the client's, within the project's limits. They go over those of the kernelspec.

        Raises as ``spec_for``; RequestError for what is not valid, NotAllowed for what is too much.
        """
        served = self._for(name, user)
        if served.file.is_local:
            return {}
        project = served.project
        allowed = project.allowed_client_fields if project else None
        client = client_fields(env, self.allowed_client_fields if allowed is None else allowed)
        fields = merge_fields(project, served.file.config, client)
        check_request(fields, project)
        return fields

    def kernel_env(self, name: str, env: Mapping[str, object]) -> dict[str, str]:
        """What of the client's environment its kernel gets. Raises NoSuchKernel, and RequestError."""
        project = self._served(name).project
        return client_environment(env, [*self.allowed_envs, *(project.allowed_envs if project else ())])

    def problems(self) -> list[str]:
        """What is wrong with which file, as it is on disk now; each is logged once."""
        self._all()
        return list(self._problems)

    # -- what jupyter_client asks ---------------------------------------------------------------------

    def find_kernel_specs(self) -> dict[str, str]:
        """Everything that is served, to whomever."""
        return {name: str(served.directory) for name, served in self._all().items()}

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        """The kernelspec whoever asks; raises NoSuchKernel also for one that is not served."""
        served = self._served(kernel_name)
        if served.file.is_local and not self.allow_local:
            raise LocalKernel(served.name)
        return served.kernel_spec(self.kernel_spec_class)

    def wrapped_spec(self, kernel_name: str) -> KernelSpec:
        """An installed kernelspec that another one wraps by ``kernel_name``; it needs not be served itself."""
        return super().get_kernel_spec(kernel_name)

    def get_all_specs(self) -> dict[str, Any]:
        """Everything that is served, to whomever; a server asks ``specs_for``."""
        return {
            name: {"resource_dir": str(served.directory), "spec": served.kernel_spec().to_dict()}
            for name, served in self._all().items()
        }

    # -- looking ----------------------------------------------------------------------------------------

    def _all(self) -> dict[str, ServedSpec]:
        """Everything that is served; what is wrong is told."""
        with self._lock:
            found, problems = self._catalog.scan()
            if not self.allow_local:
                local = [served for served in found.values() if served.file.is_local]
                problems += [f"{served.directory}: {_local_reason(served.name)}" for served in local]
            for name, directory in self._installed_directories(problems).items():
                if name in found:
                    problems.append(f"{directory} is not served: a project's kernelspec is called {name!r}, too")
                    continue
                try:
                    found[name] = self._installed(name, directory)
                except NoSuchKernel:
                    continue
                except ConfigError as error:
                    problems.append(str(error))
            self._tell(problems)
        return {name: served for name, served in found.items() if self._is_served(served)}

    def _tell(self, problems: list[str]) -> None:
        for problem in problems:
            if problem not in self._problems:
                self.log.warning("%s", problem)
        self._problems = list(dict.fromkeys(problems))

    def _is_served(self, served: ServedSpec) -> bool:
        if self.allowed_kernelspecs and served.name not in self.allowed_kernelspecs:
            return False
        return self.allow_local or not served.file.is_local

    def _installed_directories(self, problems: list[str]) -> dict[str, str]:
        try:
            return super().find_kernel_specs() if self.serve_installed else {}
        except OSError as error:
            problems.append(f"the kernelspecs on Jupyter's path cannot be listed: {error}")
            return {}

    def _installed(self, name: str, directory: str) -> ServedSpec:
        """Raises NoSuchKernel for one that is gone or whose provisioner is, ConfigError for a broken one."""
        try:
            served = self._catalog.installed(name, Path(directory))
        except OSError as error:
            # ipykernel's own is no file, but made when it is asked for; its kernels run on this host.
            raise NoSuchKernel(name) from error
        if served.file.is_local and self.allow_local:
            factory = KernelProvisionerFactory.instance(parent=self.parent)
            if not factory.is_provisioner_available(served.kernel_spec()):
                raise NoSuchKernel(name)
        return served

    def _served(self, name: str) -> ServedSpec:
        """One by name, served or local, without a look at the others. Raises NoSuchKernel."""
        key = name.lower()
        try:
            found = self._catalog.load(key)
            if found is None and self.serve_installed:
                directory = spec_directory(self, key)
                found = self._installed(key, directory) if directory else None
        except ConfigError as error:
            self._tell([*self._problems, str(error)])
            raise NoSuchKernel(name) from error
        if found is None or (self.allowed_kernelspecs and key not in self.allowed_kernelspecs):
            raise NoSuchKernel(name)
        return found

    def _for(self, name: str, user: str) -> ServedSpec:
        served = self._served(name)
        if not self._is_member(served, user):
            raise NoSuchKernel(name)
        if served.file.is_local and not self.allow_local:
            raise NotAllowed(_local_reason(name), field="name")
        if not served.file.admits(user):
            raise NotAllowed(
                f"the kernelspec {name!r} is not for the user {user!r}; its admin says who may", field="name"
            )
        return served

    def _sees(self, served: ServedSpec, user: str) -> bool:
        return served.file.admits(user) and self._is_member(served, user)

    def _is_member(self, served: ServedSpec, user: str) -> bool:
        return served.project is None or self._membership.is_member(user, served.project.members)

    def _model(self, served: ServedSpec, display_name: str, base_url: str | None) -> dict[str, Any]:
        base = base_url if base_url is not None else str(getattr(self.parent, "base_url", "/"))
        resources = {
            _resource_name(file): url_path_join(base, "kernelspecs", served.name, file)
            for file in self._catalog.resources(served)
        }
        spec = {**served.kernel_spec().to_dict(), "display_name": display_name}
        return {"name": served.name, "spec": spec, "resources": resources}


def _resource_name(file: str) -> str:
    """As jupyter_server has them: ``kernel.js``, and ``logo-64x64`` for logo-64x64.png."""
    return file if file.startswith("kernel.") else Path(file).stem


def _display_name(served: ServedSpec) -> str:
    return str(served.file.content.get("display_name") or served.name)


def _display_names(specs: Collection[ServedSpec]) -> dict[str, str]:
    """Names for people, no two of them the same: with the project's title where needed, else with the whole name."""
    names = {served.name: _display_name(served) for served in specs}
    _tell_apart(names, {served.name: served.project.title for served in specs if served.project})
    _tell_apart(names, {served.name: served.name for served in specs})
    return names


def _tell_apart(names: dict[str, str], words: Mapping[str, str]) -> None:
    count = Counter(names.values())
    for name, shown in names.items():
        if count[shown] > 1 and name in words:
            names[name] = f"{shown} ({words[name]})"
