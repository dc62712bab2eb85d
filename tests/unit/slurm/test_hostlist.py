"""Slurm's host lists, compared with scontrol where it is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway_slurm.slurm.formats import MAX_HOSTS, HostListError, expand_hostlist


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("", []), ("(null)", []), ("c1", ["c1"]), ("c[1-3]", ["c1", "c2", "c3"]),
        ("a[1-2,7],b03", ["a1", "a2", "a7", "b03"]), ("gpu[08-10]-ib", ["gpu08-ib", "gpu09-ib", "gpu10-ib"]),
        ("r[1-2]n[01-02]", ["r1n01", "r1n02", "r2n01", "r2n02"]), ("a,,b,", ["a", "b"]),
        ("a[8-011]", ["a8", "a9", "a10", "a11"]), ("a[001-3]", ["a001", "a002", "a003"]),
        ("c[1-2].x.org,d-1", ["c1.x.org", "c2.x.org", "d-1"]),
    ],
)  # fmt: skip
def test_expand(text: str, hosts: list[str]) -> None:
    """Groups, suffixes, padding and nested commas are expanded in Slurm's order."""
    assert expand_hostlist(text) == hosts


@pytest.mark.parametrize(
    "text", ["a[1-", "a1]", "a[[1]]", "a[2-1]", "a[]", "a[x]", "a[1-2-3]", "a b", "a[1]]",
    f"a[0-{MAX_HOSTS}]",
             "a[1-999999999999999999]", "a[0-255][0-255][0-1]", "a[" + "1" * 5000 + "]"]
)  # fmt: skip
def test_refused(text: str) -> None:
    """Text that is not a host list, or names too many hosts, raises HostListError."""
    with pytest.raises(HostListError):
        expand_hostlist(text)
    assert issubclass(HostListError, ValueError)


@pytest.mark.parametrize("text", ["a[1-5]", "a,b,c[1-3]", "a[1-2][1-2],b"])
def test_more_than_are_wanted_are_refused(text: str) -> None:
    """A caller can set a lower limit."""
    assert len(expand_hostlist(text, 5)) == 5
    with pytest.raises(HostListError, match="too many"):
        expand_hostlist(text, 4)


@pytest.mark.parametrize("text", ["a" * 256, "a" * 250 + "[1-100000]", "a" * 250 + "[7,123456]", "a[1]" * 128])
def test_no_name_is_longer_than_a_hosts_may_be(text: str) -> None:
    """Without this limit a short text could name a lot of characters."""
    with pytest.raises(HostListError):
        expand_hostlist(text)
    assert expand_hostlist("a" * 255) == ["a" * 255]


@given(st.text(alphabet="ab019[]-, \n", max_size=30))
def test_only_our_error(text: str) -> None:
    """Any text gives names without brackets, or HostListError."""
    try:
        hosts = expand_hostlist(text)
    except HostListError:
        return
    assert not any(set(host) & set("[], \n") for host in hosts)


NUMBER = st.integers(0, 120).map(str) | st.integers(0, 120).map(lambda n: f"{n:03}")


@st.composite
def ranges(draw: st.DrawFn) -> str:
    """One number or range, padded or not."""
    low, length, pad = draw(st.integers(0, 150)), draw(st.integers(0, 4)), draw(st.sampled_from([0, 2, 4]))
    if not length:
        return f"{low:0{pad}}"
    return f"{low:0{pad}}-{low + length:0{pad}}"


GROUP = st.lists(ranges(), min_size=1, max_size=3).map(lambda parts: f"[{','.join(parts)}]")
PREFIX = st.sampled_from(["a", "node", "gpu-x", "r1n"])
ITEM = st.builds("".join, st.tuples(PREFIX, GROUP)) | st.builds("".join, st.tuples(PREFIX, GROUP, GROUP)) | PREFIX


@pytest.fixture(scope="module")
def conf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest slurm.conf with which scontrol expands host lists."""
    if not shutil.which("scontrol"):
        pytest.skip("scontrol is not installed")
    path = tmp_path_factory.mktemp("slurm") / "slurm.conf"
    path.write_text("ClusterName=x\nSlurmctldHost=localhost\nNodeName=a\nPartitionName=p Nodes=a\n")
    return path


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(items=st.lists(ITEM, min_size=1, max_size=4))
def test_like_scontrol(conf: Path, items: list[str]) -> None:
    """The expansion equals scontrol's, name by name."""
    text = ",".join(items)
    theirs = subprocess.run(
        ["scontrol", "show", "hostnames", text],
        env={"PATH": os.environ["PATH"], "SLURM_CONF": str(conf)},
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    assert expand_hostlist(text) == theirs.stdout.split()
