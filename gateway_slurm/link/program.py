"""The launcher as one program text, which the job script carries to the node.

The text holds each module verbatim as a raw string, and registers it under its own name before ``launchers.main`` runs.
So the node runs the same code as the tests and the type checker.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

LINK_MODULES = ("wire", "flow", "envelope", "steps", "endpoints", "directories")
_QUOTES = "'''"

_LOADER = """\
import importlib.abc, importlib.util, sys
sys.modules["cffi"] = None  # pycryptodome then uses ctypes, which is loaded already: this saves 20 ms
class Carried(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name in SOURCES:
            return importlib.util.spec_from_loader(name, self, is_package=not SOURCES[name])
    def create_module(self, spec):
        return None
    def exec_module(self, module):
        exec(compile(SOURCES[module.__name__], module.__name__, "exec"), module.__dict__)
sys.meta_path.insert(0, Carried())
from launchers.main import main
main()
"""


def launchers_directory() -> Path:
    """The directory of the launcher's sources: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    for candidate in (package / "launchers", package.parent / "launchers"):
        if (candidate / "main.py").is_file():
            return candidate
    raise FileNotFoundError(
        f"the launcher's sources are neither in {package} nor in {package.parent}: reinstall gateway-slurm"
    )


@cache
def launcher_program() -> str:
    """The launcher's program text (Python >= 3.9)."""
    link = Path(__file__).resolve().parent
    sources = {"gateway_slurm": "", "gateway_slurm.link": "", "launchers": ""}
    sources |= {f"gateway_slurm.link.{name}": (link / f"{name}.py").read_text() for name in LINK_MODULES}
    sources |= {f"launchers.{path.stem}": path.read_text() for path in sorted(launchers_directory().glob("[!_.]*.py"))}
    for name, source in sources.items():
        if _QUOTES in source or source.endswith("\\"):
            raise ValueError(f"{name} holds {_QUOTES}, which would end the quoted source in the job script")
    entries = [f"{name!r}: r{_QUOTES}{source}{_QUOTES},\n" for name, source in sources.items()]
    return "SOURCES = {\n" + "".join(entries) + "}\n" + _LOADER
