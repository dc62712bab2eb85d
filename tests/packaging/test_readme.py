"""The examples, commands and links of the README and of the other pages work."""

from __future__ import annotations

import json
import os
import re
import shlex
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
from traitlets import import_item
from traitlets.config.loader import PyFileConfigLoader

from gateway_slurm import SlurmMappingKernelManager
from gateway_slurm.cli.app import build_parser
from gateway_slurm.config import FILE_NAME, load_admin_config
from gateway_slurm.gateway.auth.identity import GatewayIdentityProvider
from gateway_slurm.gateway.specs.manager import GatewayKernelSpecManager
from gateway_slurm.request import parse_request
from gateway_slurm.service import SlurmService
from gateway_slurm.testing.processes import free_port
from helpers.gateway_process import ask, start, stop
from helpers.kernel_clients import JOB, execute, jobid_of, running_kernel
from helpers.notebook_server import Server
from helpers.proxies import connects, running

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
START = ROOT / "docs" / "users" / "start.md"
GATEWAY = ROOT / "docs" / "admins" / "gateway.md"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "etc").rglob("*.md")])
_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^]]+]\(([^)\s]+)\)")


def blocks(page: Path, language: str) -> list[str]:
    """Return the code blocks of a page in one language."""
    found = _FENCE.findall(page.read_text())
    return [textwrap.dedent(text) for _indent, kind, text in found if kind == language]


def kernelspec(page: Path) -> dict[str, Any]:
    """Return the one kernel.json of a page."""
    (text,) = blocks(page, "json")
    spec: dict[str, Any] = json.loads(text)
    return spec


def jupyter(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``jupyter`` of this environment."""
    argv = [str(Path(sys.executable).parent / "jupyter"), *arguments]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60)


# -- the kernelspec -------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ["README.md", "docs/users/start.md", "docs/users/kernelspec.md"])
def test_the_examples_are_valid_requests(page):
    """The kernel.json of a page names the provisioner and has valid request fields."""
    spec = kernelspec(ROOT / page)
    provisioner = spec["metadata"]["kernel_provisioner"]
    assert provisioner["provisioner_name"] == "slurm-provisioner"
    request = parse_request(provisioner["config"], spec_language=spec["language"])
    assert request.project == "myproject"
    assert request.kernel_argv[-1] == "{connection_file}"


@pytest.mark.parametrize("page", [README, START], ids=lambda page: page.name)
def test_the_kernelspec_of_a_page_runs_as_it_stands(service, kernelspecs, monkeypatch, page):
    """Jupyter lists the kernelspec, and its kernel runs in a job."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin")
    directory = kernelspecs / "kernels" / "readme"
    directory.mkdir()
    (directory / "kernel.json").write_text(blocks(page, "json")[0])
    assert "readme" in jupyter("kernelspec", "list").stdout
    with running_kernel("readme") as (manager, client):
        assert execute(client, JOB) == jobid_of(manager)


# -- commands and settings ------------------------------------------------------------------------


def test_the_commands_of_jupyter_slurm_are_there():
    """Each ``jupyter slurm …`` that a page names has a help text."""
    pages = "".join(page.read_text() for page in PAGES)
    named = {
        re.sub(" (ada|analysis|prometheus)$", "", name) for name in re.findall(r"jupyter slurm((?: [a-z]+)+)", pages)
    }
    assert {" cluster up", " cluster down", " gateway", " token add", " doctor", " attach"} <= named
    for command in ["", *sorted(named)]:
        result = jupyter("slurm", *command.split(), "--help")
        assert result.returncode == 0, result.stderr
        # The gateway is a Jupyter application, which has another form of help.
        first = "The shared gateway" if command == " gateway" else f"usage: jupyter slurm{command}"
        assert result.stdout.startswith(first)
        assert command != " gateway" or "Default: 8888" in result.stdout


SAMPLES = [path for path in sorted((ROOT / "etc").rglob("*")) if path.is_file()]
_COMMAND = re.compile(
    r"jupyter slurm ((?:token (?:add|list|remove)|cluster|allocations|attach|doctor|logs)\b[^`\n\")>;&]*)"
)


@pytest.mark.parametrize("page", [*PAGES, *SAMPLES], ids=lambda page: str(page.relative_to(ROOT)))
def test_each_command_line_of_a_page_or_sample_is_complete(page):
    """The command accepts the options, and lacks none that it needs; placeholders count as values."""
    # In a comment of a sample a line that ends with a backslash continues in the next comment.
    text = re.sub(r"\\\n[\s#]*", " ", page.read_text(errors="replace"))
    commands = "\n".join(found[2] for found in _FENCE.findall(text)) if page.suffix == ".md" else text
    for line in _COMMAND.findall(commands):
        build_parser().parse_args(shlex.split(line, comments=True))


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_its_make_targets_are_there(page):
    """Each ``make …`` that a page names is a target of the Makefile."""
    targets = set(re.findall(r"\bmake ([a-z-]+)(?=[`\n])", (ROOT / page).read_text()))
    assert "test" in targets
    makefile = (ROOT / "Makefile").read_text()
    assert {target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)} == set()


def test_the_files_that_contributing_names_are_there():
    """The paths in CONTRIBUTING's command lines exist."""
    named = re.findall(r"\b(?:tests|scripts)/[\w/]+\.py", (ROOT / "CONTRIBUTING.md").read_text())
    assert named
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_the_settings_of_the_example_are_valid(tmp_path, monkeypatch):
    """The jupyter_slurm_config.py of the page about settings loads as it stands."""
    (text,) = blocks(ROOT / "docs" / "admins" / "settings.md", "python")
    monkeypatch.setenv("JUPYTER_CONFIG_DIR", str(tmp_path))
    (tmp_path / FILE_NAME).write_text(text)
    service = load_admin_config(SlurmService)
    assert service.response_interface == "ib0"
    assert service.response_port == "20000-20999"
    assert service.connect == "tunnel"


def test_the_public_names_in_the_pages_can_be_imported():
    """Each ``gateway_slurm.…`` in a string or an import of an example is an object of the package."""
    examples = "".join(text for page in PAGES for kind in ("python", "sh") for text in blocks(page, kind))
    named = set(re.findall(r'"(gateway_slurm(?:\.\w+)+)"', examples))
    named |= {".".join(pair) for pair in re.findall(r"from (gateway_slurm[\w.]*) import (\w+)", examples)}
    assert "gateway_slurm.SlurmMappingKernelManager" in named
    for name in sorted(named):
        import_item(name)


def test_the_settings_of_the_gateways_page_are_valid(tmp_path):
    """The jupyter_slurm_gateway_config.py of the page names existing settings with valid values."""
    (text,) = [text for text in blocks(GATEWAY, "python") if "GatewayIdentityProvider" in text]
    (tmp_path / "sample.py").write_text(text)
    config = PyFileConfigLoader("sample.py", str(tmp_path)).load_config()
    classes = {
        configurable.__name__: configurable
        for configurable in (GatewayIdentityProvider, GatewayKernelSpecManager, SlurmMappingKernelManager)
    }
    assert config.keys() == classes.keys()
    for name, settings in config.items():
        made = classes[name](config=config)
        assert {setting: getattr(made, setting) for setting in settings} == dict(settings)


# -- scripts, and the gateway -------------------------------------------------------------------------


def test_the_script_runs_as_it_stands(service, kernelspecs, tmp_path):
    """The script for users prints the node's name, through nbclient and the kernelspec of the page."""
    (text,) = [text for text in blocks(START, "python") if "nbclient" in text]
    (tmp_path / "script.py").write_text(text)
    argv = [sys.executable, str(tmp_path / "script.py")]
    result = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert (result.stdout.strip(), result.returncode) == (socket.gethostname(), 0), result.stderr


async def test_the_readmes_gateway_runs_as_it_stands(cluster, kernelspecs, tmp_path, monkeypatch):
    """In a fresh directory: a token, a gateway, and ada's Jupyter server, on which a kernel runs in a job."""
    mine, theirs = (text for text in blocks(README, "sh") if re.search("jupyter (slurm gateway|server)", text))
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
    """Run commands, of which the last one is a server, and continue when it listens on ``port``."""
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
    """Return the anchors of a page: its headings as GitHub spells them."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_internal_links_lead_somewhere(page):
    """The files and headings to which a page links exist."""
    missing = []
    for link in _LINK.findall(_FENCE.sub("", page.read_text())):
        if link.startswith("https://"):
            continue
        name, _hash, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            missing.append(link)
    assert missing == []


def test_each_page_can_be_found_from_the_readme():
    """The links from the README lead, over other pages, to every page and every sample."""
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
