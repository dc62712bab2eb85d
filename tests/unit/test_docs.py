"""What the documentation takes from the code is what the code says."""

from __future__ import annotations

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
