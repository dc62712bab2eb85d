"""The gateway's kernelspecs for each user: those of projects, and those installed for Jupyter."""

from __future__ import annotations

import threading
import time
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
from gateway_slurm.gateway.specs.default import default_name
from gateway_slurm.gateway.specs.limits import check_request, client_environment, client_fields, merge_fields
from gateway_slurm.gateway.specs.members import Membership, ask_accounts
from gateway_slurm.gateway.specs.projects import CLIENT_FIELDS, NEVER_CLIENT_FIELDS
from gateway_slurm.gateway.specs.reader import SpecReader
from gateway_slurm.request import FIELDS
from gateway_slurm.service import SlurmService


class LocalKernel(NoSuchKernel):
    """The kernelspec exists, but would run its kernels on the gateway's own host."""

    def __str__(self) -> str:
        return _local_reason(self.name)


class NoSuchResource(NoSuchKernel):
    """The kernelspec exists, but has no such file for clients."""

    def __str__(self) -> str:
        return f"there is no {self.name[:200]!r}"


def _local_reason(name: str) -> str:
    return (
        f"the kernelspec {name!r} is not served: its kernels would run on the gateway's own host, as the gateway's "
        f"user, next to its tokens. The gateway's kernels run on Slurm (provisioner_name: {PROVISIONER})"
    )


class GatewayKernelSpecManager(KernelSpecManager):
    """Serves ``<projects_root>/<project>/<name>/kernel.json`` as ``<project>.<name>``, and Jupyter's own kernelspecs.

    Methods with a ``user`` read the disk, and may query group databases and Slurm. They may block; a server calls them
    in worker threads. No file is kept open.
    """

    projects_root = Unicode(
        "",
        config=True,
        help="""Directory with one directory of kernelspecs per project. Default: none; the gateway has no
        projects.""",
    )
    serve_installed = Bool(
        True,
        config=True,
        help="Also serve the kernelspecs that are installed on Jupyter's path, to all users.",
    )
    allow_local = Bool(
        False,
        config=True,
        help="""Also serve kernelspecs of other provisioners than Slurm's. Their kernels run on the gateway's own
        host, as the gateway's user, and can read its tokens. For experiments only.""",
    )
    allowed_client_fields = List(
        Unicode(),
        list(CLIENT_FIELDS),
        config=True,
        help="""Request fields that clients may set by ``KERNEL_SLURM_<FIELD>``, unless the kernelspec's project
        has its own list. Slurm's limits apply as well.""",
    )
    allowed_envs = List(
        Unicode(),
        config=True,
        help="""Names of a client's environment variables that its kernels get, besides ``KERNEL_*`` and
        JPY_SESSION_NAME, the notebook's path. A name may end with ``*``, as in ``LC_*``.""",
    )
    membership_age = CFloat(
        300.0,
        config=True,
        help="Seconds for which the members of Unix groups and Slurm accounts are cached.",
    )

    @validate("allowed_client_fields")
    def _valid_client_fields(self, proposal: Any) -> list[str]:
        known = {field.name for field in FIELDS} - NEVER_CLIENT_FIELDS
        if wrong := [name for name in proposal["value"] if name not in known]:
            raise TraitError(
                f"GatewayKernelSpecManager.allowed_client_fields: clients cannot set {wrong}; "
                f"allowed are {', '.join(sorted(known))}"
            )
        return list(proposal["value"])

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._catalog = Catalog(Path(self.projects_root).expanduser() if self.projects_root else None)
        self._membership = Membership(
            lambda: ask_accounts(SlurmService.instance(self.log).runner), max_age=self.membership_age
        )
        self.reader = SpecReader()
        self._lock = threading.Lock()
        # The last scan, and when it began by the monotonic clock.
        self._scanned: tuple[float, dict[str, ServedSpec]] = float("-inf"), {}
        self._problems: list[str] = []

    # -- One user's kernelspecs --

    def specs_for(self, user: str, base_url: str | None = None) -> dict[str, dict[str, Any]]:
        """The ``kernelspecs`` of ``GET /api/kernelspecs`` for this user. The caller must not change them."""
        visible = self._visible_to(user)
        # A display name that occurs twice gets the project's title, and then if needed the whole name.
        names = {name: _display_name(served) for name, served in visible.items()}
        _distinguish(names, {name: served.project.title for name, served in visible.items() if served.project})
        _distinguish(names, {name: name for name in visible})
        return {name: self._model(served, names[name], base_url) for name, served in visible.items()}

    def default_for(self, user: str, wanted: str) -> str:
        """The name of the kernelspec for clients of this user that name none; ``wanted`` is the gateway's setting."""
        return default_name(self._visible_to(user), wanted)

    def _visible_to(self, user: str) -> dict[str, ServedSpec]:
        return {
            name: served
            for name, served in self._all().items()
            if served.file.admits(user) and self._is_member(served, user)
        }

    def model_for(self, name: str, user: str, base_url: str | None = None) -> dict[str, Any]:
        """The answer to ``GET /api/kernelspecs/NAME`` for this user. Raises as ``spec_for``."""
        served = self._served_to(name, user)
        models = self.specs_for(user, base_url)
        return models.get(served.name) or self._model(served, _display_name(served), base_url)

    def spec_for(self, name: str, user: str) -> KernelSpec:
        """The kernelspec. Raises NoSuchKernel if it does not exist for the user, who may be no member of its project;
        NotAllowed if its lists of users exclude the user, or if it is not served.
        """
        return self._served_to(name, user).kernel_spec(self.kernel_spec_class)

    def resource(self, name: str, path: str, user: str) -> bytes:
        """The content of a logo, kernel.js or kernel.css. Raises as ``spec_for``."""
        found = self._catalog.resource(self._served_to(name, user), path)
        if found is None:
            raise NoSuchResource(f"{name}/{path}")
        return found

    def request_fields(self, name: str, user: str, env: Mapping[str, object]) -> dict[str, object]:
        """The request fields of a kernel that ``user`` starts with this environment: the project's, the kernelspec's
        and the client's, within the project's limits. They override those of the kernelspec.

        Raises as ``spec_for``; RequestError for fields that are not valid, NotAllowed for fields beyond the limits.
        """
        served = self._served_to(name, user)
        if served.file.is_local:
            return {}
        project = served.project
        allowed = project.allowed_client_fields if project else None
        client = client_fields(env, self.allowed_client_fields if allowed is None else allowed)
        fields = merge_fields(project, served.file.config, client)
        check_request(fields, project)
        return fields

    def kernel_env(self, name: str, env: Mapping[str, object]) -> dict[str, str]:
        """The variables of the client's environment that its kernel gets. Raises NoSuchKernel, and RequestError."""
        project = self._served(name).project
        return client_environment(env, [*self.allowed_envs, *(project.allowed_envs if project else ())])

    def may_set(self, field: str, names: Collection[str]) -> bool:
        """Whether clients may set this request field of each of these kernelspecs, or without any in general."""
        lists = [self._allowed_fields(name) for name in names] or [self.allowed_client_fields]
        return all(field in allowed for allowed in lists)

    def _allowed_fields(self, name: str) -> Collection[str]:
        try:
            project = self._served(name).project
        except NoSuchKernel:
            project = None
        allowed = project.allowed_client_fields if project else None
        return self.allowed_client_fields if allowed is None else allowed

    def has_left(self, name: str, user: str) -> bool:
        """Whether the user may not have this kernelspec any more. False where that cannot be found out now."""
        try:
            served = self._served(name)
        except NoSuchKernel:
            return False  # it was removed, or cannot be read: its kernels run on
        left = served.project is not None and self._membership.has_left(user, served.project.members)
        return left or not served.file.admits(user)

    def problems(self) -> list[str]:
        """The problems of the files that are on disk now. Each is logged once."""
        self._all()
        return list(self._problems)

    # -- Called by jupyter_client --

    def find_kernel_specs(self) -> dict[str, str]:
        """All kernelspecs that are served, whichever users may see them."""
        return {name: str(served.directory) for name, served in self._all().items()}

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        """The kernelspec, whichever users may see it. Raises NoSuchKernel also for a kernelspec that is not served."""
        served = self._served(kernel_name)
        if served.file.is_local and not self.allow_local:
            raise LocalKernel(served.name)
        return served.kernel_spec(self.kernel_spec_class)

    def wrapped_spec(self, kernel_name: str) -> KernelSpec:
        """An installed kernelspec that another one wraps by ``kernel_name``. It may be one that is not served."""
        return super().get_kernel_spec(kernel_name)

    def get_all_specs(self) -> dict[str, Any]:
        """All kernelspecs that are served, whichever users may see them. The gateway itself calls ``specs_for``."""
        return {
            name: {"resource_dir": str(served.directory), "spec": served.kernel_spec().to_dict()}
            for name, served in self._all().items()
        }

    # -- Reading the disk --

    def _all(self) -> dict[str, ServedSpec]:
        """All kernelspecs that are served. Problems are logged. One scan serves all threads that wait for one."""
        asked = time.monotonic()
        with self._lock:
            begin, served = self._scanned
            if begin <= asked:
                begin, served = time.monotonic(), self._scan()
                self._scanned = begin, served
            return dict(served)

    def _scan(self) -> dict[str, ServedSpec]:
        found, problems = self._catalog.scan()
        if not self.allow_local:
            local = [served for served in found.values() if served.file.is_local]
            problems += [f"{served.directory}: {_local_reason(served.name)}" for served in local]
        for name, directory in self._installed_directories(problems).items():
            if name in found:
                problems.append(f"{directory} is not served: a project's kernelspec has the name {name!r}, too")
                continue
            try:
                found[name] = self._installed(name, directory)
            except NoSuchKernel:
                continue
            except ConfigError as error:
                problems.append(str(error))
        problems += [
            f"project {project.name}: default_kernel={project.default_kernel!r}: there is no such kernelspec"
            for project in {served.project.name: served.project for served in found.values() if served.project}.values()
            if project.default_kernel and f"{project.name}.{project.default_kernel}" not in found
        ]
        self._log_problems(problems)
        return {
            name: served
            for name, served in found.items()
            if (self.allow_local or not served.file.is_local) and self._is_allowed(name)
        }

    def _log_problems(self, problems: list[str]) -> None:
        for problem in problems:
            if problem not in self._problems:
                self.log.warning("%s", problem)
        self._problems = list(dict.fromkeys(problems))

    def _is_allowed(self, name: str) -> bool:
        return not self.allowed_kernelspecs or name in self.allowed_kernelspecs

    def _installed_directories(self, problems: list[str]) -> dict[str, str]:
        try:
            return super().find_kernel_specs() if self.serve_installed else {}
        except OSError as error:
            problems.append(f"the kernelspecs on Jupyter's path cannot be listed: {error}")
            return {}

    def _installed(self, name: str, directory: str) -> ServedSpec:
        """An installed kernelspec. Raises ConfigError, and NoSuchKernel if it or its provisioner is missing."""
        try:
            served = self._catalog.installed(name, Path(directory))
        except OSError as error:
            # ipykernel's own kernelspec has no file: ipykernel makes it on request. Its kernels run on this host.
            raise NoSuchKernel(name) from error
        if served.file.is_local and self.allow_local:
            factory = KernelProvisionerFactory.instance(parent=self.parent)
            if not factory.is_provisioner_available(served.kernel_spec()):
                raise NoSuchKernel(name)
        return served

    def _served(self, name: str) -> ServedSpec:
        """A kernelspec by name, served or local, without reading the others. Raises NoSuchKernel."""
        key = name.lower()
        try:
            found = self._catalog.load(key)
            if found is None and self.serve_installed:
                directory = spec_directory(self, key)
                found = self._installed(key, directory) if directory else None
        except ConfigError as error:
            self._log_problems([*self._problems, str(error)])
            raise NoSuchKernel(name) from error
        if found is None or not self._is_allowed(key):
            raise NoSuchKernel(name)
        return found

    def _served_to(self, name: str, user: str) -> ServedSpec:
        served = self._served(name)
        if not self._is_member(served, user):
            raise NoSuchKernel(name)
        if served.file.is_local and not self.allow_local:
            raise NotAllowed(_local_reason(name), field="name")
        if not served.file.admits(user):
            raise NotAllowed(
                f"the kernelspec {name!r} is not for the user {user!r}; the admin's lists of users decide", field="name"
            )
        return served

    def _is_member(self, served: ServedSpec, user: str) -> bool:
        return served.project is None or self._membership.is_member(user, served.project.members)

    def _model(self, served: ServedSpec, display_name: str, base_url: str | None) -> dict[str, Any]:
        base = base_url if base_url is not None else str(getattr(self.parent, "base_url", "/"))
        resources = {}
        for file in self._catalog.resources(served):
            # As in jupyter_server's models: ``kernel.js``, and ``logo-64x64`` for logo-64x64.png.
            name = file if file.startswith("kernel.") else Path(file).stem
            resources[name] = url_path_join(base, "kernelspecs", served.name, file)
        spec = {**served.kernel_spec().to_dict(), "display_name": display_name}
        return {"name": served.name, "spec": spec, "resources": resources}


def _display_name(served: ServedSpec) -> str:
    return str(served.file.content.get("display_name") or served.name)


def _distinguish(names: dict[str, str], additions: Mapping[str, str]) -> None:
    count = Counter(names.values())
    for name, display_name in names.items():
        if count[display_name] > 1 and name in additions:
            names[name] = f"{display_name} ({additions[name]})"
