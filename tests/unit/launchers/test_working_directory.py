"""The directory in which a kernel starts, as the launcher chooses it on the node."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from launchers.working_directory import Directory, NoDirectory, choose, home


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home directory beside a project's, links, a file, and a directory that the user may not enter."""
    for name in ("home/notes", "project/ann", "closed"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("project")
    (tmp_path / "broken").symlink_to("nothing")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PROJECT", str(tmp_path / "project"))
    refused = os.chdir

    def chdir(path: str) -> None:
        if str(path).endswith("/closed"):  # root may enter any directory
            raise PermissionError(13, "Permission denied", path)
        refused(path)

    monkeypatch.setattr("launchers.working_directory.os.chdir", chdir)
    return tmp_path


@pytest.mark.parametrize(
    ("hint", "default", "expected", "why"),
    [
        ("{}/project", None, "{}/project", []),
        ("{}/link", None, "{}/link", []),
        ("~", None, "{}/home", []),
        ("notes", None, "{}/home/notes", []),
        (None, None, "{}/home", []),
        (None, "$PROJECT/ann", "{}/project/ann", []),
        ("{}/project", "~/notes", "{}/project", []),
        ("/Users/ann/work", "~/notes", "{}/home/notes", ["'/Users/ann/work' (No such file or directory)"]),
        ("C:\\Users\\ann", None, "{}/home", ["C:\\\\Users\\\\ann' (No such file or directory)"]),
        ("{}/file", None, "{}/home", ["/file' (Not a directory)"]),
        ("{}/broken", None, "{}/home", ["/broken' (No such file or directory)"]),
        ("{}/closed", "$NO_SUCH/x", "{}/home", ["/closed' (Permission denied)", "$NO_SUCH/x' (No such file"]),
        ("/" + "x" * 5000, None, "{}/home", ["File name too long", "…"]),
    ],
)
def test_a_clients_directory_is_a_hint(
    places: Path, hint: str | None, default: str | None, expected: str, why: list[str]
) -> None:
    """Without it the kernel starts in the default directory, else at home; each reason is given."""
    before = os.getcwd()
    chosen = choose({"cwd": hint and hint.replace("{}", str(places)), "default_directory": default})
    assert chosen.path == expected.replace("{}", str(places))
    assert [words for words in why if words not in chosen.why] == []
    assert bool(chosen.why) == bool(why)
    assert len(chosen.why) < 1000
    assert os.getcwd() == before


@pytest.mark.parametrize(("order", "problem"), [("/no/such", "No such file"), ("$PROJECT/../closed", "Permission")])
def test_a_kernelspecs_directory_is_an_order(places: Path, order: str, problem: str) -> None:
    """Nothing else is taken in its place."""
    assert choose({"directory": "$PROJECT/ann", "cwd": str(places)}) == Directory(f"{places}/project/ann")
    with pytest.raises(NoDirectory, match=problem):
        choose({"directory": order, "cwd": str(places), "default_directory": str(places)})


def test_without_any_directory_the_start_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work that is saved in a temporary directory would be lost."""
    monkeypatch.setenv("HOME", "/no/such/home")
    with pytest.raises(NoDirectory, match=r"/no/such/home.*default_directory"):
        choose({"cwd": "/no/such/work"})


def test_a_servers_home_is_a_hint_too(tmp_path: Path) -> None:
    """A HOME that the node does not have is replaced by the home directory of the user's account."""
    assert home({"HOME": str(tmp_path)}) == str(tmp_path)
    account = pwd.getpwuid(os.getuid()).pw_dir
    assert home({"HOME": "/no/such/home"}) == home({}) == account
