"""What the README and the other pages say can be done."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from traitlets.config.loader import PyFileConfigLoader

from gateway_slurm import SlurmMappingKernelManager
from gateway_slurm.config import FILE_NAME, load_admin_config
from gateway_slurm.gateway.auth.identity import GatewayIdentityProvider
from gateway_slurm.gateway.specs.manager import GatewayKernelSpecManager
from gateway_slurm.request import parse_request
from gateway_slurm.service import SlurmService
from helpers.gateway_process import ask, start, stop
from helpers.kernel_clients import JOB, execute, jobid_of, running_kernel
from helpers.notebook_server import Server
from helpers.proxies import connects, free_port, running

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "etc").rglob("*.md")])
_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^]]+]\(([^)\s]+)\)")


def blocks(page: Path, language: str) -> list[str]:
    """The page's code blocks of a language."""
    found = _FENCE.findall(page.read_text())
    return [textwrap.dedent(text) for _indent, kind, text in found if kind == language]


def kernelspec(page: Path) -> dict[str, Any]:
    """The page's one example of a kernel.json."""
    (text,) = blocks(page, "json")
    spec: dict[str, Any] = json.loads(text)
    return spec


def jupyter(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``jupyter`` of this environment."""
    argv = [str(Path(sys.executable).parent / "jupyter"), *arguments]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60)


# -- the kernelspec -------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ["README.md", "docs/users/kernelspec.md"])
def test_the_examples_are_valid_requests(page):
    """The kernel.json of a page asks for what is allowed, by the provisioner's name."""
    spec = kernelspec(ROOT / page)
    provisioner = spec["metadata"]["kernel_provisioner"]
    assert provisioner["provisioner_name"] == "slurm-provisioner"
    request = parse_request(provisioner["config"], spec_language=spec["language"])
    assert request.project == "myproject"
    assert request.kernel_argv[-1] == "{connection_file}"


def test_the_readmes_kernelspec_runs_as_it_stands(service, kernelspecs, monkeypatch):
    """Its steps make a kernelspec that Jupyter lists and whose kernel runs in a job."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin")
    directory = kernelspecs / "kernels" / "readme"
    directory.mkdir()
    (directory / "kernel.json").write_text(blocks(README, "json")[0])
    assert "readme" in jupyter("kernelspec", "list").stdout
    with running_kernel("readme") as (manager, client):
        assert execute(client, JOB) == jobid_of(manager)


# -- commands and settings ------------------------------------------------------------------------


def test_its_commands_of_jupyter_slurm_are_there():
    """Each ``jupyter slurm …`` that the README names has a help text."""
    named = {name.removesuffix(" ada") for name in re.findall(r"jupyter slurm((?: [a-z]+)+)", README.read_text())}
    assert {" cluster up", " cluster down", " gateway", " token add"} <= named
    for command in ["", *sorted(named)]:
        result = jupyter("slurm", *command.split(), "--help")
        assert result.returncode == 0, result.stderr
        # The gateway is an application of Jupyter's, with its kind of help.
        first = "The shared gateway" if command == " gateway" else f"usage: jupyter slurm{command}"
        assert result.stdout.startswith(first)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_its_make_targets_are_there(page):
    """Each ``make …`` that a page names is a target."""
    targets = set(re.findall(r"\bmake ([a-z-]+)(?=[`\n])", (ROOT / page).read_text()))
    assert "test" in targets
    makefile = (ROOT / "Makefile").read_text()
    assert {target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)} == set()


def test_the_files_that_contributing_names_are_there():
    """The paths in CONTRIBUTING's command lines exist."""
    named = re.findall(r"\b(?:tests|scripts)/[\w/]+\.py", (ROOT / "CONTRIBUTING.md").read_text())
    assert named
    assert [name for name in named if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("page", ["README.md", "docs/admins/settings.md"])
def test_the_settings_of_the_examples_are_valid(page, tmp_path, monkeypatch):
    """A page's jupyter_slurm_config.py is taken as it stands."""
    (text,) = [text for text in blocks(ROOT / page, "python") if "SlurmService" in text]
    monkeypatch.setenv("JUPYTER_CONFIG_DIR", str(tmp_path))
    (tmp_path / FILE_NAME).write_text(text)
    service = load_admin_config(SlurmService)
    assert service.response_interface == "ib0"
    assert service.response_port == "20000-20999"
    assert service.connect == "tunnel"


def test_the_readmes_settings_of_a_gateway_are_valid(tmp_path):
    """Its jupyter_slurm_gateway_config.py names settings that are there, with values that they take."""
    (text,) = [text for text in blocks(README, "python") if "GatewayIdentityProvider" in text]
    (tmp_path / "sample.py").write_text(text)
    config = PyFileConfigLoader("sample.py", str(tmp_path)).load_config()
    classes = {
        one.__name__: one for one in (GatewayIdentityProvider, GatewayKernelSpecManager, SlurmMappingKernelManager)
    }
    assert config.keys() == classes.keys()
    for name, settings in config.items():
        made = classes[name](config=config)
        assert {setting: getattr(made, setting) for setting in settings} == dict(settings)


# -- scripts, and the gateway -------------------------------------------------------------------------


def test_the_readmes_script_runs_as_it_stands(service, kernelspecs, tmp_path):
    """It prints the node's name, by nbclient and a kernelspec that is called as the README has it."""
    (text,) = [text for text in blocks(README, "python") if "nbclient" in text]
    (tmp_path / "script.py").write_text(text)
    argv = [sys.executable, str(tmp_path / "script.py")]
    result = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert (result.stdout.strip(), result.returncode) == (socket.gethostname(), 0), result.stderr


async def test_the_readmes_gateway_runs_as_it_stands(cluster, kernelspecs, tmp_path, monkeypatch):
    """In a fresh directory: a token, a gateway, and a Jupyter server of ada's whose kernel runs in a job."""
    mine, theirs = (one for one in blocks(README, "sh") if "jupyter slurm gateway" in one or "jupyter server" in one)
    shutil.copytree(ROOT / "kernelspecs", tmp_path / "kernelspecs")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin")
    gateway, server = free_port(), free_port()
    (Path(os.environ["JUPYTER_CONFIG_DIR"]) / "jupyter_config.json").write_text('{"ServerApp": {"allow_root": true}}')
    monkeypatch.setenv("JUPYTER_TOKEN", "adas")
    theirs = theirs.replace(":8888", f":{gateway}").replace("8899", str(server))
    with shell(mine, tmp_path, gateway), shell(theirs, tmp_path, server):
        ada = Server(None, f"http://127.0.0.1:{server}", "adas", tmp_path / "log")
        assert set((await ada.json("GET", "/api/kernelspecs"))["kernelspecs"]) >= {"demo.python", "demo.gpu"}
        kernel_id = await start(ada, "demo.python")
        try:
            assert (await ask(ada, kernel_id, JOB)).isdigit()
        finally:
            await stop(ada, kernel_id)


@contextmanager
def shell(text: str, directory: Path, port: int) -> Iterator[None]:
    """Commands of which the last one is a server, once it listens on ``port``."""
    first, last = text.strip().rsplit("\n", 1)
    argv = ["/bin/sh", "-ec", f"{first}\nexec {last}"]
    environment = {"JUPYTER_PORT": str(port)}
    log = directory / f"{port}.log"

    def listens() -> bool:
        return connects(socket.AF_INET, ("127.0.0.1", port))

    with running(argv, log, listens, environment, directory=directory):
        yield


# -- links ----------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """What ``page#…`` may name: its headings as GitHub spells them."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_internal_links_lead_somewhere(page):
    """Files and headings that a page links to exist."""
    lost = []
    for link in _LINK.findall(_FENCE.sub("", page.read_text())):
        if link.startswith("https://"):
            continue
        name, _hash, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            lost.append(link)
    assert lost == []


def test_each_page_can_be_found_from_the_readme():
    """Following links from the README comes by every page and every sample."""
    seen: set[Path] = set()
    ahead = [README]
    while ahead:
        page = ahead.pop().resolve()
        if page in seen:
            continue
        seen.add(page)
        if page.is_dir():
            ahead += page.glob("*.md")
        elif page.suffix == ".md":
            links = [link.partition("#")[0] for link in _LINK.findall(page.read_text())]
            ahead += [page.parent / link for link in links if link and not link.startswith("https://")]
    wanted = {*PAGES, *(path for path in (ROOT / "etc").rglob("*") if path.is_file())}
    assert {str(path.relative_to(ROOT)) for path in wanted if path.resolve() not in seen} == set()
