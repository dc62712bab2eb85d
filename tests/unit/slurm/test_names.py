"""Names of jobs: from an admin's template and users' text."""

from __future__ import annotations

import pytest

from gateway_slurm.config import ServiceSettings
from gateway_slurm.slurm.names import (
    MAX_NAME_BYTES,
    clean_name,
    file_of,
    job_name,
    kernel_log,
    launcher_log,
    parse_log,
)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("analysis.ipynb", "analysis.ipynb"),
        ("--exclusive", "exclusive"),
        ("../.hidden", "_.hidden"),
        ("a b;c`d`'\"$\\\n\x1b[31m", "a_b_c_d________31m"),
        ("Übung 分析.ipynb", "Übung_分析.ipynb"),
        ("u\u0308.ipynb", "\u00fc.ipynb"),
        ("\u202egnp.ipynb", "_gnp.ipynb"),
        ("\U0001f600.ipynb", "_.ipynb"),
        ("half \ud83d", "half__"),
        ("%j-%A", "_j-_A"),
    ],
)
def test_a_name_has_no_character_that_a_program_acts_on(text, name):
    """No option, path, shell syntax, control sequence, reading order or Slurm pattern."""
    assert clean_name(text) == name


@pytest.mark.parametrize("character", ["a", "ü", "分"])
def test_a_name_is_bounded_in_bytes_and_cut_between_characters(character):
    """A megabyte of text is as good as a little of it."""
    name = clean_name(character * 1_000_000)
    assert set(name) == {character}
    assert MAX_NAME_BYTES - 3 < len(name.encode()) <= MAX_NAME_BYTES


@pytest.mark.parametrize("path", ["a.ipynb", "work/deep/a.ipynb", "/home/u/a.ipynb", r"C:\Users\u\a.ipynb"])
def test_the_notebooks_name_is_the_last_part_of_its_path(path):
    """The client's server may run on any system."""
    assert file_of(path) == "a.ipynb"


def test_a_template_is_filled_with_cleaned_values():
    """A value cannot contain a placeholder, and a name is never empty."""
    values = {"notebook": "{user}.ipynb", "user": "ann@corp", "project": "climate"}
    assert job_name("jpy:{project}:{user}:{notebook}", values, "x") == "jpy:climate:ann@corp:_user_.ipynb"
    assert job_name("{kernelspec}", values, "x") == "x"


@pytest.mark.parametrize("template", ["", " ", "{", "{}", "{0}", "{notebook!r}", "{user:>9}", "{user.x}", "x" * 201])
def test_a_wrong_template_is_found_when_the_settings_are_read(template):
    """The message names the setting and the placeholders that there are."""
    with pytest.raises(Exception, match=r"SlurmService\.job_name must be .*\{notebook\}, \{kernelspec\}"):
        ServiceSettings(job_name=template)


@pytest.mark.parametrize(
    ("kernel_id", "session", "found"),
    [
        (
            "0f8fad5b-d9cb-469f-a165-70867728950e",
            "w/my plan.ipynb",
            ("0f8fad5b-d9cb-469f-a165-70867728950e", "my_plan.ipynb"),
        ),
        ("0f8fad5b-d9cb-469f-a165-70867728950e", "", ("0f8fad5b-d9cb-469f-a165-70867728950e", "")),
        ("kernel-3", "", ("kernel-3", "")),
        ("../../x", "", ("_.._x", "")),
    ],
)
def test_a_kernels_log_is_found_by_job_kernel_and_notebook(kernel_id, session, found):
    """Its name is enough: no index is kept; and it is short enough for a file system."""
    name = kernel_log("12", kernel_id, session)
    assert "/" not in name
    assert parse_log(name) == ("12", *found)
    assert parse_log(f"{name}.1") == ("12", *found)
    assert len(kernel_log("1" * 10, "0" * 36, "分" * 300).encode()) < 250


def test_other_files_are_no_logs():
    """A user may keep files of their own in the directory."""
    assert parse_log(launcher_log("12")) == ("12", "", "")
    assert [parse_log(name) for name in ("kernel-plan.txt", "launcher-x.log", "store.sqlite")] == [None] * 3
