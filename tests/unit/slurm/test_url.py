from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as some
from traitlets import TraitError

from gateway_slurm.config import ServiceSettings
from gateway_slurm.slurm.url import ClusterUrl, parse_cluster_url


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("local:", ClusterUrl("local")),
        ("", ClusterUrl("local")),
        ("ssh://login", ClusterUrl("ssh", "login")),
        ("ssh://ann@login01.example.org:2222", ClusterUrl("ssh", "login01.example.org", 2222, "ann")),
        ("ssh://ann@example.org@login", ClusterUrl("ssh", "login", None, "ann@example.org")),
        ("ssh://[2001:db8::1]:22", ClusterUrl("ssh", "2001:db8::1", 22)),
        ("ssh://192.0.2.7/\n", ClusterUrl("ssh", "192.0.2.7")),
        ("rest+http://slurm:6820", ClusterUrl("rest", "slurm", 6820)),
        ("rest+https://slurm.example.org:6821", ClusterUrl("rest", "slurm.example.org", 6821, tls=True)),
        ("rest+https://slurm", ClusterUrl("rest", "slurm", 443, tls=True)),
    ],
)
def test_a_cluster_is_named_by_one_url(text: str, url: ClusterUrl) -> None:
    """Each documented form is read, and its text is the same again."""
    assert parse_cluster_url(text) == url
    assert parse_cluster_url(str(url)) == url


def test_a_rest_interface_has_a_base_address() -> None:
    """An IPv6 address before a port keeps its brackets."""
    assert parse_cluster_url("rest+http://[::1]:6820").base == "http://[::1]:6820"
    assert parse_cluster_url("rest+https://slurm:443").base == "https://slurm:443"


@pytest.mark.parametrize(
    "text",
    [
        "login",
        "https://slurm:6820",
        "ssh:login",
        "ssh://",
        "ssh://ann@",
        "ssh://@login",
        "ssh://-oProxyCommand=x",
        "ssh://-x@login",
        "ssh://login:0",
        "ssh://login:65536",
        "ssh://login:x",
        "ssh://login/path",
        "ssh://log in",
        "ssh://[login]",
        "ssh://log\nin",
        "rest+http://",
        "rest+http://ann@slurm:6820",
        "local:/x",
    ],
)
def test_other_text_is_refused(text: str) -> None:
    """A mistake is a clear error and never another cluster."""
    with pytest.raises(ValueError, match=r"\w"):
        parse_cluster_url(text)


SCHEMES = some.sampled_from(["", "local:", "ssh://", "rest+http://", "rest+https://", "ssh:"])
REST = some.text(alphabet="aZ0.-_@:/[]%\u00b2\u0660\n ", max_size=20) | some.text(max_size=20)


@given(some.builds(str.__add__, SCHEMES, REST))
def test_any_text_names_one_cluster_or_none(text: str) -> None:
    """The only error is ValueError; an accepted text means the same when it is read again."""
    try:
        url = parse_cluster_url(text)
    except ValueError:
        return
    assert parse_cluster_url(str(url)) == url


def test_a_password_in_the_url_is_refused_and_not_repeated() -> None:
    """The setting stands in a file that others may read, and messages go to logs."""
    for text in ("ssh://ann:hunter2@login", "https://ann:hunter2@login"):
        with pytest.raises(ValueError, match=r"\w") as refused:
            parse_cluster_url(text)
        assert "hunter2" not in str(refused.value)


def test_the_setting_is_checked_when_it_is_made() -> None:
    """The error names the setting."""
    assert ServiceSettings(cluster="ssh://ann@login").cluster == "ssh://ann@login"
    with pytest.raises(TraitError, match=r"SlurmService\.cluster: .*ssh://"):
        ServiceSettings(cluster="login")
