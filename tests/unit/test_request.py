"""Request fields: which values are accepted, which are refused, and the messages."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_slurm.errors import RequestError
from gateway_slurm.request import FIELDS, KernelRequest, parse_request

NEW = {
    "project": "p1",
    "partition": "batch",
    "nodes": "2",
    "runtime": 30,
    "kernel_argv": ["k", "{connection_file}"],
}
SLURM_TEXT = (
    "project",
    "partition",
    "reservation",
    "qos",
    "constraint",
    "gres",
    "node",
    "memory",
    "time",
    "jobid",
)


def refused(config: dict[str, Any]) -> RequestError:
    """Parse a request that is not valid, and return the error."""
    with pytest.raises(RequestError) as caught:
        parse_request(config)
    return caught.value


def test_existing_kernel_json() -> None:
    """A kernel.json of jupyter-slurm-provisioner keeps its meaning."""
    config = {
        "gpus": "0",
        "nodes": "2",
        "partition": "batch",
        "project": "training",
        "reservation": "None",
        "runtime": 30,
        "jobid": "None",
        "node": "None",
        "kernel_argv": ["~/.local/share/jupyter/kernels/my_kernel/kernel.sh", "-f", "{connection_file}"],
    }
    assert parse_request(config, spec_language="python") == KernelRequest(
        project="training",
        partition="batch",
        nodes=2,
        runtime=30,
        kernel_argv=tuple(config["kernel_argv"]),
        kernel_language="python",
    )


@pytest.mark.parametrize("unset", ["None", "", None, "  "])
@pytest.mark.parametrize("field", [field.name for field in FIELDS if not field.required])
def test_unset(field: str, unset: object) -> None:
    """None, "None" and the empty text mean that a field is not set."""
    assert parse_request({**NEW, field: unset}) == parse_request(NEW)


@pytest.mark.parametrize("field", ["project", "partition", "nodes", "runtime", "kernel_argv"])
def test_missing_required(field: str) -> None:
    """A missing required field is named."""
    error = refused({name: value for name, value in NEW.items() if name != field})
    assert error.field == field
    assert repr(field) in str(error)


def test_alternatives() -> None:
    """time replaces runtime, kernel_name replaces kernel_argv, and jobid replaces the fields of a new job."""
    new = {name: value for name, value in NEW.items() if name not in ("runtime", "kernel_argv")}
    request = parse_request({**new, "time": "1-00", "kernel_name": "ir"})
    assert (request.time_limit, request.kernel_name, request.kernel_argv) == ("1-00", "ir", ())
    assert parse_request({"jobid": 123, "kernel_argv": ["k"]}).jobid == "123"
    assert parse_request({**NEW, "time": "90"}).time_limit == "90"


def test_unknown_field_suggests_the_nearest() -> None:
    """An unknown field is quoted, the known ones are listed, and the nearest is suggested."""
    error = refused({**NEW, "partion": "batch"})
    assert "'partion'" in str(error)
    assert "did you mean 'partition'?" in str(error)
    assert "kernel_argv" in str(error)
    assert "did you mean" not in str(refused({**NEW, "zzzzzz": 1}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("nodes", 0), ("nodes", -1), ("nodes", True), ("nodes", 1.5), ("nodes", "1e3"), ("nodes", "٣"),
        pytest.param("nodes", 10**5000, id="nodes-huge"), ("runtime", "30m"), ("gpus", -1), ("cpus", "0"),
        ("partition", "-p"), ("partition", "--wrap=id"), ("partition", "a b"), ("partition", "a\nb"),
        ("partition", "a\0"), ("partition", "$(id)"), ("partition", "x" * 256), ("partition", ["a"]),
        ("project", "ä"), ("project", "a;b"), ("qos", "a,b"), ("reservation", "'r'"), ("constraint", "a`id`"),
        ("constraint", "-a"), ("gres", "gpu:1 --x"), ("node", "c[1-2]"), ("node", "c1,c2"),
        ("memory", "lots"), pytest.param("kernel_argv", ["x" * 100_000] * 11, id="argv-long"),
        ("time", "soon"), ("time", "0"), ("time", "1-2-3"), ("jobid", "12 3"), ("jobid", "1.0"),
        ("directory", "work"), ("directory", "$(id)"), ("directory", "/a\nb"), ("default_directory", "--x"),
        ("jobid", -5), ("jobid", "01"), ("jobid", "0"),
        pytest.param("jobid", 10**5000, id="jobid-huge"), ("jobid", True), ("connect", "plain"),
        ("connect", 1), ("kernel_name", "../x"),
        ("kernel_argv", "ipython"), ("kernel_argv", []), ("kernel_argv", [""]), ("kernel_argv", ["a", 1]),
        ("kernel_argv", ["a\0b"]), ("kernel_argv", ["x" * (128 << 10)]), ("kernel_argv", ["\ud800"]),
        ("kernel_argv", ["é" * (64 << 10)]), ("kernel_language", "a\nb"),
    ],
)  # fmt: skip
def test_invalid_values(field: str, value: object) -> None:
    """The message quotes the value, shortened, and names the field and the allowed values."""
    error = refused({**NEW, field: value})
    assert error.field == field
    assert f"{field!r}: " in str(error)
    assert "allowed" in str(error)
    assert len(str(error)) < 800


@pytest.mark.parametrize("jobid", ["123_4", "123+1"])
def test_components_are_refused_with_the_reason(jobid: str) -> None:
    """Array tasks and components of heterogeneous jobs are recognised, and refused with the reason."""
    assert "cannot be adopted yet" in str(refused({"jobid": jobid, "kernel_argv": ["k"]}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("constraint", "[rack1*2&rack2*4]"), ("constraint", "(knl&a)|hsw"), ("gres", "gpu:a100:2,shard:1"),
        ("partition", "batch,gpu"), ("memory", "4G"), ("memory", "0"), ("time", "UNLIMITED"),
        ("node", "c1.example"),
        ("project", "chem-1.x"), ("connect", "tunnel"), ("reservation", "maint_2"),
    ],
)  # fmt: skip
def test_slurm_syntax_is_carried(field: str, value: str) -> None:
    """Slurm's own syntax is carried unchanged."""
    assert getattr(parse_request({**NEW, field: value}), field) == value


def test_argv_is_data() -> None:
    """Shell syntax, quotes, line ends and unicode in kernel_argv are carried as data."""
    argv = ["sh", "-c", "echo $(id) `id` 'x' \"y\"\n;ä☃", "", "x" * ((128 << 10) - 1)]
    assert parse_request({**NEW, "kernel_argv": argv}).kernel_argv == tuple(argv)


def test_gres_list() -> None:
    """The GPUs and the other generic resources become one list; 0 GPUs add nothing."""
    assert parse_request({**NEW, "gpus": "2", "gres": "shard:1,fpga"}).gres_list == [
        "gpu:2",
        "shard:1",
        "fpga",
    ]
    assert parse_request({**NEW, "gpus": 0}).gres_list == []


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=4,
)


@given(st.dictionaries(st.sampled_from([field.name for field in FIELDS]) | st.text(max_size=8), JSON, max_size=6))
def test_only_request_errors(config: dict[str, object]) -> None:
    """Parsing any kernelspec gives a request or a RequestError, and no other error."""
    with contextlib.suppress(RequestError):
        assert parse_request({**NEW, **config})


@given(st.sampled_from(SLURM_TEXT), st.text(max_size=40))
def test_text_for_slurm_is_harmless(field: str, value: str) -> None:
    """A text that reaches Slurm's argv has no blank or control character and is no option."""
    try:
        text = getattr(parse_request({**NEW, field: value}), field)
    except RequestError:
        return
    if text is not None:
        assert text.isascii()
        assert text.isprintable()
        assert not set(text) & set(" \t\n\0;$`'\"\\")
        assert not text.startswith("-")


def test_table_has_every_field() -> None:
    """The documentation's table and the dataclass have the same fields."""
    assert {field.name for field in FIELDS} == set(KernelRequest.__dataclass_fields__)
    page = (Path(__file__).parents[2] / "docs" / "users" / "kernelspec.md").read_text()
    assert all(f"| `{field.name}` |" in page for field in FIELDS)
