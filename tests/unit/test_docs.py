"""What the documentation takes from the code is what the code says."""

from __future__ import annotations

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from jupyter_core.application import JupyterApp
from traitlets.config import Config, Configurable
from traitlets.config.loader import PyFileConfigLoader

from gateway_slurm import SlurmMappingKernelManager
from gateway_slurm.config import FILE_NAME, load_admin_config
from gateway_slurm.gateway.app import SlurmGatewayApp
from gateway_slurm.gateway.auth.identity import GatewayIdentityProvider
from gateway_slurm.gateway.specs.manager import GatewayKernelSpecManager
from gateway_slurm.service import SlurmService

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "etc" / FILE_NAME
GATEWAY_SAMPLE = ROOT / "etc" / "jupyter_slurm_gateway_config.py"
GATEWAY_CLASSES = (SlurmGatewayApp, GatewayIdentityProvider, GatewayKernelSpecManager, SlurmMappingKernelManager)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script that draws the documentation; as a module, since it imports all of the gateway."""
    spec = importlib.util.spec_from_file_location("draw_docs", ROOT / "scripts" / "draw_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def draw(script, monkeypatch, capsys) -> Callable[..., tuple[int, str]]:
    """Run it with these options: its exit status, and what it printed."""

    def run(*options: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["draw_docs.py", *options])
        try:
            return int(script.main()), capsys.readouterr().out
        except SystemExit as error:
            return 1, str(error)

    return run


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The repository's documentation, to be spoilt."""
    for name in ("docs", "etc"):
        shutil.copytree(ROOT / name, tmp_path / name)
    return tmp_path


def test_the_drawn_parts_are_up_to_date():
    """The tables of fields, settings, states, messages and variables, and the sample, are as the code has them."""
    argv = [sys.executable, str(ROOT / "scripts" / "draw_docs.py"), "--check"]
    check = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert (check.returncode, check.stdout, check.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("page", "row"),
    [
        ("docs/users/kernelspec.md", "| `partition` |"),
        ("docs/admins/settings.md", "| `queue_timeout` |"),
        ("docs/developers/states.md", "| `RUNNING` |"),
        ("docs/users/kernelspec.md", "| `SLURM_*` |"),
        ("docs/developers/link.md", "| `START` |"),
        ("docs/admins/identity.md", "| `tokens_file` |"),
        ("docs/admins/projects.md", "| `limits.max_gpus` |"),
        ("docs/admins/projects.md", "| `projects_root` |"),
        ("docs/admins/gateway.md", "| `max_kernels_per_user` |"),
        ("etc/jupyter_slurm_config.py", "# c.SlurmService.queue_timeout"),
        ("etc/jupyter_slurm_gateway_config.py", "# c.SlurmGatewayApp.base_url"),
    ],
)
def test_a_stale_part_is_found_and_drawn_again(draw, copy, page, row):
    """A row that is missing fails the check, which changes nothing; drawing brings the page back."""
    path = copy / page
    good = path.read_text()
    spoilt = "".join(line for line in good.splitlines(keepends=True) if not line.startswith(row))
    assert spoilt != good
    path.write_text(spoilt)
    status, printed = draw("--check", "--root", str(copy))
    assert status == 1
    assert page in printed
    assert path.read_text() == spoilt
    assert draw("--root", str(copy))[0] == 0
    assert path.read_text() == good


def test_a_table_that_no_page_shows_is_an_error(draw, copy):
    """A block whose comments are lost from its page is missed by name."""
    path = copy / "docs" / "developers" / "states.md"
    path.write_text(path.read_text().replace("<!-- drawn: states -->", ""))
    status, said = draw("--check", "--root", str(copy))
    assert status != 0
    assert "states" in said


# -- the code that the pages name ------------------------------------------------------------------------


HOW_IT_WORKS = ROOT / "docs" / "developers" / "how-it-works.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"


def functions_of(path: Path) -> set[str]:
    """Return the functions of a file and the methods of its classes, as ``Class.method``."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            methods = (child for child in node.body if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))
            found |= {f"{node.name}.{method.name}" for method in methods}
    return found


def test_the_walk_through_a_kernels_start_names_existing_functions():
    """Each stop is a file of the repository, linked, and a function in it."""
    stops = re.findall(r"^\| \d \| \[`(.+?)`]\((.+?)\) \| `(.+?)` \|", HOW_IT_WORKS.read_text(), re.MULTILINE)
    assert len(stops) >= 8
    for name, link, function in stops:
        assert (HOW_IT_WORKS.parent / link).resolve() == ROOT / name
        assert function in functions_of(ROOT / name), f"{name} has no {function}"


def test_the_tree_of_rooms_is_the_package():
    """The tree shows every file and directory at the root of the package, and nothing else."""
    (tree,) = re.findall(r"^gateway_slurm/\n((?:  .+\n)+)launchers/", HOW_IT_WORKS.read_text(), re.MULTILINE)
    shown = {line.split()[0].rstrip("/") for line in tree.splitlines()}
    package = ROOT / "gateway_slurm"
    rooms = {path.parent.name for path in package.glob("*/__init__.py")} | {path.name for path in package.glob("*.py")}
    assert shown | {"__init__.py"} == rooms


@pytest.mark.parametrize("page", [HOW_IT_WORKS, CONTRIBUTING], ids=lambda page: page.name)
def test_the_order_of_imports_is_the_one_that_the_layers_test_checks(page):
    """The rooms of the order, from left to right, are those of tests/unit/test_layers.py."""
    (order,) = re.findall(r"^errors, .+\n.+ cli$", page.read_text(), re.MULTILINE)
    groups = [{name.strip() for name in group.split(",")} for group in order.split("<")]
    (checked,) = (
        list(ast.literal_eval(node.value))
        for node in ast.parse((ROOT / "tests" / "unit" / "test_layers.py").read_text()).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ORDER"
    )
    for group in groups:
        assert set(checked[: len(group)]) == group
        del checked[: len(group)]
    assert checked == []


# -- the sample ---------------------------------------------------------------------------------------


@pytest.fixture
def config_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The first directory of Jupyter's config path, empty."""
    monkeypatch.setenv("JUPYTER_CONFIG_DIR", str(tmp_path))
    return tmp_path


def settings_of(service: SlurmService) -> dict[str, object]:
    """Every setting's value."""
    return {name: getattr(service, name) for name in SlurmService.class_trait_names(config=True)}


def test_the_sample_changes_nothing_as_it_is(config_directory):
    """The sample as it stands loads, and leaves every setting at its default."""
    shutil.copy(SAMPLE, config_directory)
    assert settings_of(load_admin_config(SlurmService)) == settings_of(SlurmService())


def test_the_sample_uncommented_is_every_setting_at_its_default(config_directory):
    """With everything uncommented all names and values are valid, and the values are the defaults."""
    text = re.sub(r"(?m)^# ", "", SAMPLE.read_text())
    (config_directory / FILE_NAME).write_text(text)
    service = load_admin_config(SlurmService)
    assert settings_of(service) == settings_of(SlurmService())
    own = SlurmService.class_own_traits(config=True)
    assert own.keys() <= service.config["SlurmService"].keys()


# -- the gateway's sample -------------------------------------------------------------------------------


def loaded(path: Path) -> Config:
    """What a configuration file sets."""
    return PyFileConfigLoader(path.name, str(path.parent)).load_config()


def test_the_gateways_sample_has_the_name_that_the_gateway_looks_for():
    """Its file is found under the application's name, and sets nothing as it stands."""
    assert issubclass(SlurmGatewayApp, JupyterApp)
    assert GATEWAY_SAMPLE.name == f"{SlurmGatewayApp.name.replace('-', '_')}_config.py"
    assert loaded(GATEWAY_SAMPLE) == {}


@pytest.mark.parametrize("of", GATEWAY_CLASSES, ids=lambda of: of.__name__)
def test_the_gateways_sample_uncommented_is_every_setting_at_its_default(of, tmp_path, monkeypatch):
    """All settings of the gateway's classes are in it, under their names, and the values are the defaults."""
    for variable in ("JUPYTER_PORT", "JUPYTERHUB_API_URL", "JUPYTERHUB_OAUTH_ACCESS_SCOPES"):
        monkeypatch.delenv(variable, raising=False)
    path = tmp_path / GATEWAY_SAMPLE.name
    path.write_text(re.sub(r"(?m)^# ", "", GATEWAY_SAMPLE.read_text()))
    config = loaded(path)
    assert config.keys() == {one.__name__ for one in GATEWAY_CLASSES}
    section = dict(config[of.__name__])
    default = of(config=Config())
    assert section == {name: getattr(default, name) for name in section}
    assert own_settings(of) <= section.keys()


def own_settings(of: type[Configurable]) -> set[str]:
    """Those that the class itself has and that are in use."""
    traits = of.class_own_traits(config=True)
    return {name for name, trait in traits.items() if not str(trait.help).startswith("Not used")}
