"""The gateway's kernelspecs, from files that change under it."""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import itertools
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from jupyter_client.kernelspec import NoSuchKernel
from traitlets import TraitError

from gateway_slurm.errors import NotAllowed, RequestError
from gateway_slurm.gateway.specs import catalog as files
from gateway_slurm.gateway.specs.manager import GatewayKernelSpecManager, NoSuchResource

CONFIG = {"project": "demo", "partition": "batch", "nodes": 1, "runtime": 30, "kernel_name": "python3"}


def write_json(path: Path, content: object) -> Path:
    """Write a file and the directories that it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def kernel_json(display_name="Python", provisioner="slurm-provisioner", metadata=None, config=None, **more):
    """What a kernel.json says."""
    stanza = {"provisioner_name": provisioner, "config": {**CONFIG, **(config or {})}}
    if not provisioner:
        return {"display_name": display_name, "language": "python", "argv": ["python3"], **more}
    return {
        "display_name": display_name,
        "language": "python",
        "metadata": {"kernel_provisioner": stanza, **(metadata or {})},
        **more,
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two projects with a python each: ``clim`` for ada and ben, ``geo`` for ben."""
    root = tmp_path / "projects"
    write_json(root / "clim" / "project.json", {"title": "Climate", "members": {"users": ["ada", "ben"]}})
    write_json(root / "geo" / "project.json", {"title": "Geology", "members": {"users": ["ben"]}})
    for name in ("clim", "geo"):
        write_json(root / name / "python" / "kernel.json", kernel_json())
    return root


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only directory in which Jupyter finds kernelspecs: one for Slurm, and one for this host."""
    directory = tmp_path / "kernels"
    write_json(directory / "slurm" / "kernel.json", kernel_json("Slurm"))
    write_json(directory / "python3" / "kernel.json", kernel_json("Here", provisioner=""))
    return directory


@pytest.fixture
def manager(root, installed):
    """A manager of both: ``manager(allow_local=True)`` has that setting."""

    def make(**traits: object) -> GatewayKernelSpecManager:
        return GatewayKernelSpecManager(projects_root=str(root), kernel_dirs=[str(installed)], **traits)

    return make


# -- who sees what ------------------------------------------------------------------------------------


def test_members_see_their_projects_and_all_users_what_is_installed(manager):
    """The list is each user's own."""
    specs = manager()
    assert list(specs.specs_for("ada")) == ["clim.python", "slurm"]
    assert list(specs.specs_for("ben")) == ["clim.python", "geo.python", "slurm"]
    assert list(specs.specs_for("eve")) == ["slurm"]
    assert "geo.python" in specs.specs_for("ben")
    assert "geo.python" not in specs.specs_for("ada")
    assert "nothing" not in specs.specs_for("ada")
    assert list(manager(serve_installed=False).specs_for("eve")) == []


def test_what_a_user_does_not_see_is_not_there(manager):
    """Naming another project's kernelspec is answered as if there were none, everywhere."""
    specs = manager()
    for name in ("geo.python", "geo.missing", "nowhere.python", "missing", "../geo/python", "geo.", ".python", ""):
        for ask in (
            lambda name=name: specs.spec_for(name, "ada"),
            lambda name=name: specs.model_for(name, "ada"),
            lambda name=name: specs.request_fields(name, "ada", {}),
            lambda name=name: specs.resource(name, "logo-svg.svg", "ada"),
        ):
            with pytest.raises(NoSuchKernel):
                ask()


def test_two_kernelspecs_that_look_the_same_get_their_projects_titles(manager, root):
    """Only where a user sees both; and where the titles are the same, too, their names."""
    specs = manager()
    assert specs.specs_for("ada")["clim.python"]["spec"]["display_name"] == "Python"
    shown = {name: model["spec"]["display_name"] for name, model in specs.specs_for("ben").items()}
    assert shown == {"clim.python": "Python (Climate)", "geo.python": "Python (Geology)", "slurm": "Slurm"}
    assert specs.model_for("geo.python", "ben")["spec"]["display_name"] == "Python (Geology)"
    write_json(root / "geo" / "other" / "kernel.json", kernel_json())
    shown = [model["spec"]["display_name"] for model in specs.specs_for("ben").values()]
    assert len(set(shown)) == 4
    assert "Python (Geology) (geo.other)" in shown


def test_the_model_is_what_jupyter_serves(manager, root):
    """Name, spec, and the URLs of logos under the server's base URL."""
    for name in ("logo-svg.svg", "logo-64x64.png", "kernel.js", "notes.txt"):
        (root / "clim" / "python" / name).write_text("x")
    model = manager().specs_for("ada", "/base/")["clim.python"]
    assert model["resources"] == {
        "kernel.js": "/base/kernelspecs/clim.python/kernel.js",
        "logo-64x64": "/base/kernelspecs/clim.python/logo-64x64.png",
        "logo-svg": "/base/kernelspecs/clim.python/logo-svg.svg",
    }
    assert set(model) == {"name", "spec", "resources"}
    spec = manager().spec_for("clim.python", "ada")
    assert model["spec"] == {**spec.to_dict(), "display_name": "Python"}
    assert spec.resource_dir == str(root / "clim" / "python")


@pytest.mark.parametrize("place", ["process_proxy", "metadata", "config"])
@pytest.mark.parametrize(
    ("key", "value", "users"),
    [
        ("authorized_users", "ada, zoe", {"ada"}),
        ("authorized_users", ["ada"], {"ada"}),
        ("authorized_users", "", {"ada", "ben"}),
        ("unauthorized_users", ["ada"], {"ben"}),
        ("unauthorized_users", "ben,eve", {"ada"}),
    ],
)
def test_a_kernelspec_may_be_for_some_of_the_members(manager, root, place, key, value, users):
    """The lists are Enterprise Gateway's, where it has them or with the rest; a member who is not on them hears so."""
    spec = {
        "process_proxy": kernel_json(metadata={"process_proxy": {"class_name": "x", "config": {key: value}}}),
        "metadata": kernel_json(metadata={key: value}),
        "config": kernel_json(config={key: value}),
    }[place]
    write_json(root / "clim" / "python" / "kernel.json", spec)
    specs = manager()
    assert {user for user in ("ada", "ben", "eve") if "clim.python" in specs.specs_for(user)} == users
    for user in {"ada", "ben"} - users:
        with pytest.raises(NotAllowed, match=user):
            specs.spec_for("clim.python", user)
        assert "clim.python" not in specs.specs_for(user)
    with pytest.raises(NoSuchKernel):
        specs.spec_for("clim.python", "eve")
    config = specs.get_kernel_spec("clim.python").metadata["kernel_provisioner"]["config"]
    assert key not in config
    assert specs.problems() == []


# -- only Slurm's ---------------------------------------------------------------------------------------


def test_what_would_run_on_the_gateways_host_is_not_served(manager, root):
    """It is in no list, and naming it is refused with the reason; it can still be wrapped by ``kernel_name``."""
    write_json(root / "clim" / "here" / "kernel.json", kernel_json(provisioner=""))
    write_json(root / "clim" / "there" / "kernel.json", kernel_json(provisioner="local-provisioner"))
    specs = manager()
    for name in ("python3", "clim.here", "clim.there"):
        assert name not in specs.specs_for("ada")
        assert name not in specs.find_kernel_specs()
        assert name not in specs.get_all_specs()
        with pytest.raises(NotAllowed, match="gateway's own host"):
            specs.spec_for(name, "ada")
        with pytest.raises(NotAllowed):
            specs.request_fields(name, "ada", {})
        with pytest.raises(NoSuchKernel, match="gateway's own host"):
            specs.get_kernel_spec(name)
    assert specs.wrapped_spec("python3").display_name == "Here"
    with pytest.raises(NoSuchKernel):
        specs.wrapped_spec("clim.python")
    assert [problem.partition(":")[0] for problem in specs.problems()] == [
        str(root / "clim" / name) for name in ("here", "there")
    ]


def test_an_admin_can_have_local_kernels_served(manager, root):
    """With ``allow_local``; no request fields go with them."""
    specs = manager(allow_local=True)
    assert "python3" in specs.specs_for("eve")
    assert specs.get_kernel_spec("python3").display_name == "Here"
    assert specs.request_fields("python3", "eve", {}) == {}
    write_json(root / "clim" / "here" / "kernel.json", kernel_json(provisioner=""))
    assert "clim.here" in specs.specs_for("ada")
    assert specs.problems() == []


def test_allowed_kernelspecs_hold_for_all(manager):
    """Jupyter's own setting is a filter over projects, too."""
    specs = manager(allowed_kernelspecs={"slurm", "geo.python"})
    assert list(specs.specs_for("ben")) == ["geo.python", "slurm"]
    with pytest.raises(NoSuchKernel):
        specs.spec_for("clim.python", "ben")


# -- changes on disk ------------------------------------------------------------------------------------


def test_changes_on_disk_show_at_once(manager, root):
    """A kernelspec that is added, changed and removed, and a project's new members, without a restart."""
    specs = manager()
    assert "clim.new" not in specs.specs_for("ada")
    path = write_json(root / "clim" / "new" / "kernel.json", kernel_json("One"))
    assert specs.specs_for("ada")["clim.new"]["spec"]["display_name"] == "One"
    write_json(path, kernel_json("Two"))
    assert specs.specs_for("ada")["clim.new"]["spec"]["display_name"] == "Two"
    (path.parent / "logo-svg.svg").write_text("x")
    assert "logo-svg" in specs.specs_for("ada")["clim.new"]["resources"]
    shutil.rmtree(path.parent)
    assert "clim.new" not in specs.specs_for("ada")
    write_json(root / "clim" / "project.json", {"members": {"users": ["eve"]}})
    assert list(specs.specs_for("ada")) == ["slurm"]
    assert "clim.python" in specs.specs_for("eve")
    shutil.rmtree(root / "clim")
    assert list(specs.specs_for("eve")) == ["slurm"]


def files_read(specs):
    """How many files the manager has read so far."""
    catalog = specs._catalog
    return sum(cache.reads for cache in (catalog._projects, catalog._specs, catalog._installed))


def test_two_hundred_kernelspecs_are_listed_without_reading_them_again(manager, root, monkeypatch):
    """When nothing has changed, a list costs no read at all, and little time."""
    monkeypatch.setattr(files, "SETTLED_SECONDS", 0.05)
    for number in range(200):
        write_json(root / "clim" / f"k{number}" / "kernel.json", kernel_json(f"Kernel {number}"))
    time.sleep(0.1)  # the files have to be of some age: that is what is tested
    specs = manager()
    assert len(specs.specs_for("ada")) == 202
    reads = files_read(specs)
    begun = time.monotonic()
    for _ in range(5):
        specs.specs_for("ada")
    assert time.monotonic() - begun < 10
    assert files_read(specs) == reads
    write_json(root / "clim" / "k7" / "kernel.json", kernel_json("Changed"))
    specs.specs_for("ada")
    assert files_read(specs) == reads + 1


def test_many_threads_may_ask(manager, root):
    """While files come and go each thread gets a whole list, and no error."""
    specs = manager()
    writing = threading.Lock()  # the files are one admin's to change, who does one thing after the other

    def ask(number: int) -> int:
        with writing:
            write_json(root / "clim" / f"k{number % 4}" / "kernel.json", kernel_json())
            if number % 3 == 0:
                shutil.rmtree(root / "clim" / f"k{number % 4}", ignore_errors=True)
        return len(specs.specs_for("ben"))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        counts = list(pool.map(ask, range(80)))
    assert all(3 <= count <= 7 for count in counts)


# -- what is broken -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        {"display_name": 5, "language": "python"},
        kernel_json(argv="python"),
        kernel_json(unknown=1),
        kernel_json(resource_dir="/etc"),
        kernel_json(config={"gpu": 1}),
        kernel_json(config={"nodes": "many"}),
        kernel_json(config={"authorized_users": 5}),
        {"metadata": 5},
        {"metadata": {"kernel_provisioner": 5}},
        {"metadata": {"kernel_provisioner": {"provisioner_name": "slurm-provisioner", "config": []}}},
        '{"display_name": "a", "display_name": "b"}',
        " " * (files.MAX_FILE_BYTES + 1),
    ],
    ids=range(15),
)
def test_a_broken_kernelspec_takes_out_itself_only(manager, root, content, caplog):
    """It is reported with its file, logged once, and back when it is mended."""
    path = write_json(root / "clim" / "broken" / "kernel.json", content)
    specs = manager()
    specs.log = logging.getLogger("specs")
    for _ in range(3):
        assert list(specs.specs_for("ada")) == ["clim.python", "slurm"]
        with pytest.raises(NoSuchKernel):
            specs.spec_for("clim.broken", "ada")
    (problem,) = specs.problems()
    assert problem.startswith(f"{path}: ")
    assert caplog.text.count(str(path)) == 1
    write_json(path, kernel_json())
    assert "clim.broken" in specs.specs_for("ada")
    assert specs.problems() == []
    write_json(path, content)
    assert "clim.broken" not in specs.specs_for("ada")
    assert caplog.text.count(str(path)) == 2


@pytest.mark.parametrize("content", ["", "{", {"limit": {}}, {"members": {"users": "ada"}}, None])
def test_a_broken_project_has_no_members(manager, root, content):
    """Without a valid file the project is served to no user, rather than to all; other projects are served."""
    path = root / "clim" / "project.json"
    path.unlink() if content is None else write_json(path, content)
    specs = manager()
    assert list(specs.specs_for("ben")) == ["geo.python", "slurm"]
    for ask in (specs.spec_for, specs.model_for):
        with pytest.raises(NoSuchKernel):
            ask("clim.python", "ben")
    with pytest.raises(NoSuchKernel):
        specs.get_kernel_spec("clim.python")
    (problem,) = specs.problems()
    assert str(path) in problem


def test_directories_whose_names_cannot_be_kernels_are_told(manager, root):
    """A dot in a project's name, or a capital letter; what has no kernel.json, or begins with a dot, is none."""
    for name in ("a.b", "Clim"):
        write_json(root / name / "project.json", {})
    write_json(root / "clim" / "Python" / "kernel.json", kernel_json())
    (root / "clim" / "Notes").mkdir()
    (root / ".git").mkdir()
    (root / "README.md").write_text("x")
    specs = manager()
    assert list(specs.specs_for("ada")) == ["clim.python", "slurm"]
    assert [problem.partition(" is ")[0] for problem in specs.problems()] == [
        str(root / "Clim"),
        str(root / "a.b"),
        str(root / "clim" / "Python"),
    ]


def test_a_broken_installed_kernelspec_is_told(manager, installed):
    """So is one that has the name of a project's."""
    write_json(installed / "bad" / "kernel.json", "{")
    write_json(installed / "clim.python" / "kernel.json", kernel_json("Other"))
    specs = manager()
    assert list(specs.specs_for("ada")) == ["clim.python", "slurm"]
    assert specs.get_kernel_spec("clim.python").display_name == "Python"
    assert len(specs.problems()) == 2


def test_a_root_that_is_missing_is_told(tmp_path, installed):
    """What is installed is served all the same."""
    specs = GatewayKernelSpecManager(projects_root=str(tmp_path / "missing"), kernel_dirs=[str(installed)])
    assert list(specs.specs_for("ada")) == ["slurm"]
    assert "missing cannot be read" in specs.problems()[0]


# -- links ------------------------------------------------------------------------------------------------


def test_a_kernelspec_does_not_lead_out_of_its_project(manager, root, tmp_path):
    """Neither its directory nor its kernel.json may be a link to elsewhere, not even to another project."""
    write_json(tmp_path / "outside" / "kernel.json", kernel_json("Outside"))
    (root / "clim" / "away").symlink_to(tmp_path / "outside")
    (root / "clim" / "theirs").symlink_to(root / "geo" / "python")
    (root / "clim" / "file").mkdir()
    (root / "clim" / "file" / "kernel.json").symlink_to(tmp_path / "outside" / "kernel.json")
    (root / "clim" / "again").symlink_to("python")
    specs = manager()
    assert list(specs.specs_for("ada")) == ["clim.again", "clim.python", "slurm"]
    for name in ("clim.away", "clim.theirs", "clim.file"):
        with pytest.raises(NoSuchKernel):
            specs.spec_for(name, "ada")
    assert len(specs.problems()) == 3
    assert all("leads out of" in problem for problem in specs.problems())


def test_the_file_of_a_project_does_not_lead_out_of_it(manager, root, tmp_path):
    """A link in place of project.json would give the limits of another project, or quote another file."""
    write_json(tmp_path / "outside.json", {})
    for name, target in (("clim", root / "geo" / "project.json"), ("geo", tmp_path / "outside.json")):
        (root / name / "project.json").rename(root / name / "was.json")
        (root / name / "project.json").symlink_to(target)
    specs = manager()
    assert list(specs.specs_for("ada")) == ["slurm"]
    assert [problem for problem in specs.problems() if "leads out of" not in problem] == []
    (root / "clim" / "project.json").unlink()
    (root / "clim" / "project.json").symlink_to("was.json")
    assert list(specs.specs_for("ada")) == ["clim.python", "slurm"]


def test_a_link_that_leads_nowhere_harms_no_other_kernelspec(manager, root):
    """Circular and broken links: as directories they are ignored, as files they are reported."""
    (root / "circle").symlink_to("circle")
    (root / "gone").symlink_to("missing")
    (root / "clim" / "circle").symlink_to("circle")
    for name, target in (("one", "kernel.json"), ("two", "missing")):
        (root / "clim" / name).mkdir()
        (root / "clim" / name / "kernel.json").symlink_to(target)
    specs = manager()
    assert list(specs.specs_for("ada")) == ["clim.python", "slurm"]
    (problem,) = specs.problems()
    assert str(root / "clim" / "one") in problem
    with pytest.raises(NoSuchKernel):
        specs.spec_for("clim.one", "ada")


def test_resources_do_not_lead_out_of_the_project(manager, root, tmp_path):
    """Neither by a link nor by ``..``; and only logos, kernel.js and kernel.css are any."""
    directory = root / "clim" / "python"
    (tmp_path / "secret").write_text("secret")
    (directory / "logo-good.svg").write_text("good")
    (directory / "logo-shared.svg").symlink_to("../logo.svg")
    (root / "clim" / "logo.svg").write_text("shared")
    (directory / "logo-out.svg").symlink_to(tmp_path / "secret")
    (directory / "logo-theirs.svg").symlink_to(root / "geo" / "python" / "kernel.json")
    (directory / "logo-none.svg").symlink_to("missing")
    (directory / "logo-dir.svg").mkdir()
    os.mkfifo(directory / "logo-pipe.svg")
    specs = manager()
    assert set(specs.specs_for("ada")["clim.python"]["resources"]) == {"logo-good", "logo-shared"}
    assert specs.resource("clim.python", "logo-good.svg", "ada") == b"good"
    assert specs.resource("clim.python", "logo-shared.svg", "ada") == b"shared"
    for name in (
        "logo-out.svg",
        "logo-theirs.svg",
        "logo-none.svg",
        "logo-dir.svg",
        "logo-pipe.svg",
        "logo-missing.svg",
        "kernel.json",
        "../project.json",
        "logo-/../../project.json",
        str(tmp_path / "secret"),
        "",
        "logo-a\0",
    ):
        with pytest.raises(NoSuchResource):
            specs.resource("clim.python", name, "ada")
    with pytest.raises(NoSuchKernel):
        specs.resource("clim.python", "logo-good.svg", "eve")


def swap_after(
    monkeypatch: pytest.MonkeyPatch, owner: object, function: str, path: Path, make: Callable[[Path], object], call: int
) -> None:
    """When the ``call``-th call of ``function`` for ``path`` is over, ``make`` has put something else in its place."""
    original = getattr(owner, function)
    calls = itertools.count(1)

    def swapping(given, *args, **kwargs):
        answer = original(given, *args, **kwargs)
        if str(given) == str(path) and next(calls) == call:
            path.unlink()
            make(path)
        return answer

    monkeypatch.setattr(owner, function, swapping)


LOOKS = [(os.path, "realpath", 1), (Path, "stat", 1), (Path, "stat", 2)]


@pytest.mark.parametrize(("owner", "function", "call"), LOOKS, ids=str)
def test_a_file_that_becomes_a_link_while_it_is_looked_at_is_not_served(
    manager, root, tmp_path, monkeypatch, owner, function, call
):
    """A member who can write to the project puts a link in place of what was a file a moment before."""
    secret = write_json(tmp_path / "secret.json", kernel_json("Secret"))
    logo, spec = root / "clim" / "python" / "logo-svg.svg", root / "clim" / "python" / "kernel.json"
    logo.write_text("logo")
    specs = manager()
    swap_after(monkeypatch, owner, function, logo, lambda path: path.symlink_to(secret), call)
    for _ in range(3):
        with contextlib.suppress(NoSuchResource):
            assert specs.resource("clim.python", "logo-svg.svg", "ada") == b"logo"
    swap_after(monkeypatch, owner, function, spec, lambda path: path.symlink_to(secret), call)
    for _ in range(3):
        with contextlib.suppress(NoSuchKernel):
            assert specs.spec_for("clim.python", "ada").display_name == "Python"


def test_a_directory_that_becomes_a_link_while_it_is_looked_at_is_not_served(manager, root, tmp_path, monkeypatch):
    """The same with the directory above the file."""
    write_json(tmp_path / "outside" / "kernel.json", kernel_json("Outside"))
    directory = root / "clim" / "python"

    def move(_path: Path) -> None:
        directory.rename(directory.with_name(".old"))
        directory.symlink_to(tmp_path / "outside")

    specs = manager()
    swap_after(monkeypatch, os.path, "realpath", directory / "kernel.json", move, 1)
    with pytest.raises(NoSuchKernel):
        specs.spec_for("clim.python", "ada")
    assert "leads out of" in " ".join(specs.problems())


def test_a_link_that_becomes_a_file_while_it_is_followed_is_no_error_of_the_servers(manager, root, monkeypatch):
    """readlink(2) of a file that is no link any more fails (EINVAL): it is reported as a file that cannot be read."""
    directory = root / "clim" / "python"
    (directory / "logo-svg.svg").symlink_to("logo-64x64.svg")
    (directory / "logo-64x64.svg").write_text("logo")

    def realpath(path, **_options):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)

    specs = manager()
    monkeypatch.setattr(os.path, "realpath", realpath)
    assert list(specs.specs_for("ada")) == ["slurm"]
    with pytest.raises(NoSuchResource):
        specs.resource("slurm", "logo-svg.svg", "ada")


@pytest.mark.parametrize("call", [1, 2])
def test_a_file_that_becomes_a_pipe_while_it_is_read_blocks_no_reader(manager, root, monkeypatch, call):
    """Opening a pipe waits for a writer: the list of all kernelspecs would wait with it."""
    path = root / "clim" / "python" / "kernel.json"
    specs = manager()
    swap_after(monkeypatch, Path, "stat", path, os.mkfifo, call)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(specs.specs_for, "ada")
        try:
            assert "slurm" in asked.result(20)
        finally:
            if not asked.done():
                path.write_text("")  # so that the thread can end


# -- what is started --------------------------------------------------------------------------------------


def test_a_start_gets_the_projects_the_kernelspecs_and_the_clients_fields(manager, root):
    """Each over the one before; in an ordinary kernelspec the gateway's setting says what clients may set."""
    project = {
        "account": "money",
        "partitions": ["batch", "gpu"],
        "limits": {"max_gpus": 2},
        "allowed_client_fields": ["gpus", "partition"],
    }
    write_json(root / "clim" / "project.json", project)
    write_json(root / "clim" / "python" / "kernel.json", kernel_json(config={"project": None}))
    specs = manager(allowed_client_fields=["runtime"])
    env = {"KERNEL_SLURM_GPUS": "2", "KERNEL_SLURM_PARTITION": "gpu", "KERNEL_USERNAME": "ada"}
    assert specs.request_fields("clim.python", "ada", env) == {
        **CONFIG,
        "project": "money",
        "gpus": "2",
        "partition": "gpu",
    }
    for name, variable in (("clim.python", "RUNTIME"), ("slurm", "GPUS")):
        with pytest.raises(NotAllowed, match=variable):
            specs.request_fields(name, "ada", {f"KERNEL_SLURM_{variable}": "1"})
    assert specs.request_fields("slurm", "ada", {"KERNEL_SLURM_RUNTIME": "5"})["runtime"] == "5"
    with pytest.raises(NotAllowed, match="max_gpus=2") as caught:
        specs.request_fields("clim.python", "ada", {"KERNEL_SLURM_GPUS": "3"})
    assert caught.value.field == "gpus"
    with pytest.raises(RequestError, match="gpus"):
        specs.request_fields("clim.python", "ada", {"KERNEL_SLURM_GPUS": "some"})


def test_a_kernelspec_beyond_its_projects_limits_is_told_and_refused(manager, root):
    """It stays in the list, since a client may ask for less."""
    limits = {"limits": {"max_nodes": 2, "max_runtime": 60}, "members": {"users": ["ada"]}}
    write_json(root / "clim" / "project.json", limits)
    write_json(root / "clim" / "python" / "kernel.json", kernel_json(config={"nodes": 8}))
    specs = manager()
    assert "clim.python" in specs.specs_for("ada")
    assert "nodes: 8" in specs.problems()[0]
    with pytest.raises(NotAllowed, match="max_nodes=2"):
        specs.request_fields("clim.python", "ada", {})
    assert specs.request_fields("clim.python", "ada", {"KERNEL_SLURM_NODES": "2"})["nodes"] == "2"


def test_kernels_get_what_gateway_and_project_allow_of_the_clients_environment(manager, root):
    """Both lists count, for the project's kernelspecs only."""
    write_json(root / "clim" / "project.json", {"allowed_envs": ["PROJECT_*"]})
    specs = manager(allowed_envs=["LANG"])
    env = {"KERNEL_ID": "1", "LANG": "C", "PROJECT_DATA": "x", "PATH": "/bin", "KERNEL_SLURM_GPUS": "1"}
    assert specs.kernel_env("clim.python", env) == {"KERNEL_ID": "1", "LANG": "C", "PROJECT_DATA": "x"}
    assert specs.kernel_env("slurm", env) == {"KERNEL_ID": "1", "LANG": "C"}


def test_a_setting_that_would_let_clients_say_what_runs_is_refused(manager):
    """So is one that names no request field."""
    for name in ("kernel_argv", "gpu"):
        with pytest.raises(TraitError, match=name):
            manager(allowed_client_fields=["gpus", name])


def test_a_kernelspec_is_not_changed_by_its_callers(manager):
    """Each caller has one of their own."""
    specs = manager()
    specs.get_kernel_spec("clim.python").metadata["kernel_provisioner"]["config"]["nodes"] = 99
    specs.get_kernel_spec("clim.python").env["A"] = "b"
    assert specs.get_kernel_spec("clim.python").metadata["kernel_provisioner"]["config"]["nodes"] == 1
    assert specs.get_kernel_spec("clim.python").env == {}
