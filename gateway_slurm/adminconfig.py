"""The admin's settings: ``jupyter_slurm_config.py`` on Jupyter's config path, in every mode alike."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from jupyter_core.paths import jupyter_config_path
from traitlets import TraitError
from traitlets.config import Config, LoggingConfigurable
from traitlets.config.loader import PyFileConfigLoader

from gateway_slurm.errors import ConfigError

FILE_NAME = "jupyter_slurm_config.py"

C = TypeVar("C", bound=LoggingConfigurable)


def load_admin_config(configurable: type[C]) -> C:
    """An instance of ``configurable`` with the settings of all files found.

    What comes first on Jupyter's config path wins; in a virtual environment that is the
    environment's own directory, before the user's.

    Raises ConfigError that names file and setting.
    """
    config = Config()
    for path in config_files():
        config.merge(_read(path, configurable))
    return configurable(config=config)


def config_files() -> list[Path]:
    """Those that are there, the one that wins last."""
    # The path begins with what wins.
    paths = [Path(directory) / FILE_NAME for directory in reversed(jupyter_config_path())]
    return [path for path in paths if path.is_file()]


def _read(path: Path, configurable: type[C]) -> Config:
    try:
        config = PyFileConfigLoader(path.name, str(path.parent)).load_config()
    except (Exception, SystemExit) as error:  # the file is Python: what it raises is the admin's to mend
        raise ConfigError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    name = configurable.__name__
    known = configurable.class_trait_names(config=True)
    for section in config:
        if section != name:
            raise ConfigError(f"{path}: there is no class {section} to set; the settings are those of {name}")
    for setting in config.get(name, {}):
        if setting not in known:
            raise ConfigError(f"{path}: there is no setting {name}.{setting}; known are {', '.join(sorted(known))}")
    try:
        # Each file alone, so that a wrong value is reported with the file it stands in.
        configurable(config=config)
    except TraitError as error:
        raise ConfigError(f"{path}: {error}") from error
    return config
