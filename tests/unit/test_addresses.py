"""The addresses of the response socket: the settings for them, their text and their order."""

from __future__ import annotations

import socket
from types import SimpleNamespace

import psutil
import pytest
from traitlets import TraitError

from gateway_slurm import addresses
from gateway_slurm.addresses import all_addresses, endpoints, failed_dials, interface_addresses
from gateway_slurm.config import ServiceSettings
from gateway_slurm.errors import ConfigError
from gateway_slurm.link.endpoints import parse_endpoint

HOST = socket.gethostname()


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("10.1.2.3:5000", ("10.1.2.3", 5000)),
        ("login.example.org:1", ("login.example.org", 1)),
        ("[fd00::1]:5000", ("fd00::1", 5000)),
        ("fd00::1", None),
        ("fd00::5000", None),
        ("[fd00::1]", None),
        ("[login]:5", None),
        ("login", None),
        (":5", None),
        ("login:0", None),
        ("login:65536", None),
        ("login:²", None),
        ("login:00000000000080", None),
    ],
)
def test_an_endpoint_is_a_host_and_a_port_with_brackets_around_ipv6_only(text, endpoint):
    """An IPv6 address without brackets is no host with a port, whatever its last group looks like."""
    assert parse_endpoint(text) == endpoint


@pytest.mark.parametrize(
    ("configured", "first"),
    [
        ("login.example.org", "login.example.org:7"),
        ("login.example.org:99", "login.example.org:99"),
        ("10.0.0.1", "10.0.0.1:7"),
        ("10.0.0.1:99", "10.0.0.1:99"),
        ("fd00::1", "[fd00::1]:7"),
        ("[fd00::1]", "[fd00::1]:7"),
        ("[fd00::1]:99", "[fd00::1]:99"),
        ("", "10.9.9.9:7"),
    ],
)
def test_the_configured_address_comes_first_with_its_own_port_or_the_bound_one(configured, first):
    """The interface's addresses and the host's name follow, the name last; each can be read back."""
    settings = ServiceSettings(response_address=configured)
    announced = endpoints(settings.response_address, ["10.9.9.9", "fd00::9"], 7)
    assert announced[0] == first
    assert announced[-3:] == ["10.9.9.9:7", "[fd00::9]:7", f"{HOST}:7"]
    assert all(map(parse_endpoint, announced))


@pytest.mark.parametrize(
    "wrong", ["login:99999", "a b", "a,b", "fe80::1", "[fe80::1%eth0]:5", "http://login", "-x", "[x"]
)
def test_an_address_that_launchers_could_not_dial_is_refused_as_a_setting(wrong):
    """The message names the setting and the allowed values."""
    with pytest.raises(TraitError, match=r"SlurmService.response_address must be .*\[address\]:port for IPv6"):
        ServiceSettings(response_address=wrong)


def interfaces(monkeypatch: pytest.MonkeyPatch, **found: list[str]) -> None:
    """Pretend that this machine has these interfaces with these addresses."""
    entries = {
        name: [
            SimpleNamespace(family=socket.AF_INET6 if ":" in text else socket.AF_INET, address=text) for text in texts
        ]
        for name, texts in found.items()
    }
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: entries)


def test_link_local_addresses_are_left_out(monkeypatch):
    """With or without a scope id: on another host they mean nothing, or another machine."""
    interfaces(monkeypatch, lo=["127.0.0.1"], ib0=["10.0.0.1", "fe80::1%ib0", "fe80::2", "169.254.0.1", "fd00::1"])
    assert interface_addresses("ib0") == ["10.0.0.1", "fd00::1"]
    assert set(all_addresses()) == {"127.0.0.1", "10.0.0.1", "fd00::1"}


def test_the_default_routes_addresses_come_first_and_loopback_last(monkeypatch):
    """IPv4 comes before IPv6; addresses of docker's and similar interfaces come later."""
    interfaces(monkeypatch, lo=["::1", "127.0.0.1"], a=["10.0.0.1", "fd00::1"], docker0=["172.17.0.1", "fd00:d::1"])
    routes = {socket.AF_INET: "172.17.0.1", socket.AF_INET6: "fd00:d::1"}
    monkeypatch.setattr(addresses, "_route_address", lambda family, _destination: routes[family])
    assert all_addresses() == ["172.17.0.1", "fd00:d::1", "10.0.0.1", "fd00::1", "127.0.0.1", "::1"]


def test_an_interface_without_an_address_to_dial_is_an_error_of_the_settings(monkeypatch):
    """The server must not listen on all interfaces instead."""
    interfaces(monkeypatch, ib0=["fe80::1%ib0"])
    with pytest.raises(ConfigError, match="'ib0' has no IP address that other hosts can dial"):
        interface_addresses("ib0")


def test_the_reason_of_each_failed_dial_is_read_from_the_launchers_log():
    """The last reason for each address counts. Addresses that were not tried are listed; another log gives nothing."""
    log = "link: 10.0.0.1:5: no answer within 3 s\nlink: 10.0.0.1:5: No route to host\nlink: [fd00::1]:5: x\nother\n"
    reasons = failed_dials(log, ["10.0.0.1:5", "[fd00::1]:5", "name:5"])
    assert [reason.partition(" (")[0] for reason in reasons] == [
        "10.0.0.1:5: No route to host", "[fd00::1]:5: x", "name:5: not tried",
    ]  # fmt: skip
    assert failed_dials("Traceback …", ["10.0.0.1:5"]) == []
