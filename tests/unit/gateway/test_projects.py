"""What a project.json may say, and who is a member."""

from __future__ import annotations

import grp
import json
import os
import pwd

import pytest

from gateway_slurm.errors import ConfigError, SlurmUnavailable
from gateway_slurm.gateway.specs.members import Membership, accounts_command, parse_accounts, unix_groups
from gateway_slurm.gateway.specs.projects import KEYS, Limits, Members, parse_project

FULL = {
    "title": "Climate, second phase",
    "account": "clim2",
    "partition": "batch",
    "partitions": ["batch", "gpu"],
    "default_directory": "$SCRATCH/climate",
    "default_kernel": "python",
    "limits": {"max_nodes": 4, "max_gpus": "8", "max_cpus": 128, "max_memory": "256G", "max_runtime": 480},
    "allowed_client_fields": ["gpus", "runtime"],
    "allowed_envs": ["LC_*", "HF_TOKEN"],
    "members": {"users": ["ada"], "groups": ["clim"], "accounts": ["Clim2"]},
}


def project(**content):
    """A project with this file."""
    return parse_project("demo", json.dumps(content))


def test_every_key_is_read():
    """What the file says is what the project is; memory is in MiB, accounts are in small letters."""
    full = project(**FULL)
    assert full.title == "Climate, second phase"
    assert full.defaults == {"project": "clim2", "partition": "batch", "default_directory": "$SCRATCH/climate"}
    assert full.partitions == ("batch", "gpu")
    assert full.limits == Limits(max_nodes=4, max_gpus=8, max_cpus=128, max_memory=262144, max_runtime=480)
    assert full.allowed_client_fields == ("gpus", "runtime")
    assert full.allowed_envs == ("LC_*", "HF_TOKEN")
    assert full.members == Members(users=frozenset({"ada"}), groups=frozenset({"clim"}), accounts=frozenset({"clim2"}))
    said = {name for name, value in FULL.items() if not isinstance(value, dict)}
    said |= {f"{name}.{key}" for name, value in FULL.items() if isinstance(value, dict) for key in value}
    assert said == {key.name for key in KEYS}


def test_an_empty_file_is_a_project_for_all_users():
    """Nothing is limited, and its title is its directory's name."""
    empty = project()
    assert (empty.title, empty.members, empty.defaults, empty.limits.are_any) == ("demo", None, {}, False)


def test_members_that_name_no_user_are_no_members():
    """An empty ``members`` is not the same as none."""
    assert project(members={}).members == Members()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"max_nodes": 4}, "'max_nodes' is unknown.*limits.max_nodes"),
        ({"limits": {"nodes": 4}}, "limits.nodes.*unknown"),
        ({"limits": 4}, "limits is not a JSON object"),
        ({"members": ["ada"]}, "members is not a JSON object"),
        ({"members.users": ["ada"], "members": {"users": "ada"}}, "list of users"),
        ({"title": ""}, "title"),
        ({"title": "a\nb"}, "title"),
        ({"limits": {"max_nodes": -1}}, "limits.max_nodes=-1"),
        ({"limits": {"max_nodes": 0}}, "limits.max_nodes"),
        ({"limits": {"max_nodes": None}}, "limits.max_nodes"),
        ({"limits": {"max_gpus": True}}, "limits.max_gpus"),
        ({"limits": {"max_memory": "lots"}}, "limits.max_memory"),
        ({"limits": {"max_memory": 0}}, "limits.max_memory"),
        ({"limits": {"max_memory": None}}, "limits.max_memory"),
        ({"partitions": "batch"}, "list of partitions"),
        ({"partitions": ["batch,gpu"]}, "one partition"),
        ({"partition": "huge", "partitions": ["batch"]}, "not one of"),
        ({"account": "-x"}, "account"),
        ({"account": "None"}, "account"),
        ({"allowed_client_fields": ["kernel_argv"]}, "except kernel_argv"),
        ({"allowed_client_fields": ["gpu"]}, "'gpu'"),
        ({"allowed_envs": ["*"]}, "allowed_envs"),
        ({"allowed_envs": ["A=B"]}, "allowed_envs"),
        ({"members": {"users": ["0"]}}, "members.users"),
        ({"members": {"users": [["ada"]]}}, "members.users"),
        ({"members": {"groups": ["a,b"]}}, "members.groups"),
        ({"members": {"accounts": [None]}}, "members.accounts"),
    ],
)
def test_a_mistake_is_an_error_that_names_the_key(content, words):
    """A limit with a wrong name or value is an error, and not silently ignored."""
    with pytest.raises(ConfigError, match=words):
        project(**content)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "{", '{"title": "a", "title": "b"}', b"\xff", "[" * 100_000, '{"limits": {"a": 1, "a": 2}}'],
)
def test_what_is_no_json_object_is_an_error(text):
    """A key that is there twice, too: one of the two would not count."""
    with pytest.raises(ConfigError):
        parse_project("demo", text)


# -- members ----------------------------------------------------------------------------------------------


class Slurm:
    """Stands in for sacctmgr: what it says, and how often it was asked."""

    def __init__(self, **accounts: str) -> None:
        self.accounts = {user: frozenset({account}) for user, account in accounts.items()}
        self.asked = 0
        self.now = 0.0
        self.broken = False

    def ask(self):
        self.asked += 1
        if self.broken:
            raise SlurmUnavailable("slurmdbd is down")
        return self.accounts

    def membership(self) -> Membership:
        return Membership(self.ask, max_age=100, clock=lambda: self.now)


def test_members_are_named_or_in_a_group_or_have_an_account():
    """One of the three is enough."""
    me = pwd.getpwuid(os.getuid()).pw_name
    group = grp.getgrgid(os.getgid()).gr_name
    membership = Slurm(cyd="clim").membership()
    assert membership.is_member("anybody", None)
    assert not membership.is_member("anybody", Members())
    assert membership.is_member("ada", Members(users=frozenset({"ada"})))
    assert not membership.is_member("ben", Members(users=frozenset({"ada"})))
    assert membership.is_member(me, Members(groups=frozenset({group, "other"})))
    assert not membership.is_member(me, Members(groups=frozenset({"no-such-group"})))
    assert membership.is_member("cyd", Members(accounts=frozenset({"clim"})))
    assert not membership.is_member("ada", Members(accounts=frozenset({"clim"})))


def test_a_user_whom_the_host_does_not_know_has_no_groups():
    """Nor has one with a name that is none."""
    assert unix_groups("no-such-user-here") == frozenset()
    assert unix_groups("a\0b") == frozenset()


def test_slurm_is_asked_once_for_all_users_and_again_when_that_is_old():
    """Not at all where no project names an account, and not for members by name."""
    slurm = Slurm(ada="clim", ben="clim")
    membership = slurm.membership()
    members = Members(users=frozenset({"zoe"}), accounts=frozenset({"clim"}))
    assert membership.is_member("zoe", members)
    assert slurm.asked == 0
    assert membership.is_member("ada", members)
    assert membership.is_member("ben", members)
    assert not membership.is_member("eve", members)
    assert slurm.asked == 1
    slurm.accounts = {}
    slurm.now = 99
    assert membership.is_member("ada", members)
    slurm.now = 101
    assert not membership.is_member("ada", members)
    assert slurm.asked == 2


def test_while_slurm_does_not_answer_no_user_is_a_member_by_account(caplog):
    """It is logged, not asked at each request, and over when slurmdbd is back."""
    slurm = Slurm(ada="clim")
    membership = slurm.membership()
    members = Members(accounts=frozenset({"clim"}))
    assert membership.is_member("ada", members)
    slurm.now, slurm.broken = 200, True
    assert not membership.is_member("ada", members)
    assert not membership.is_member("ada", members)
    assert slurm.asked == 2
    assert "slurmdbd is down" in caplog.text
    slurm.now, slurm.broken = 240, False
    assert membership.is_member("ada", members)


def test_sacctmgrs_answer_is_read():
    """One line a user and account; accounts' own lines have no user. What is not understood is left out."""
    assert accounts_command()[:2] == ["sacctmgr", "-nP"]
    text = "|root\nroot|root\n|clim\nada|clim\nada|Geo\nben|clim\n\na|b|c\n"
    assert parse_accounts(0, text, "") == {
        "root": frozenset({"root"}),
        "ada": frozenset({"clim", "geo"}),
        "ben": frozenset({"clim"}),
    }
    with pytest.raises(SlurmUnavailable, match="not connect"):
        parse_accounts(1, "ada|clim\n", "sacctmgr: error: could not connect to slurmdbd")


def test_who_has_left_is_known_only_while_slurm_answers():
    """An outage of slurmdbd takes no user's rights, and an old answer keeps none."""
    now, answers = [0.0], [{"ada": frozenset({"clim"})}]

    def ask():
        if answers[0] is None:
            raise SlurmUnavailable("down")
        return answers[0]

    members = Members(accounts=frozenset({"clim"}))
    membership = Membership(ask, max_age=300.0, clock=lambda: now[0])
    assert not membership.has_left("ada", members)
    assert membership.has_left("ben", members)
    answers[0] = {}
    assert not membership.has_left("ada", members)
    now[0] = 30.0
    assert membership.has_left("ada", members)
    answers[0] = None
    now[0] = 60.0
    assert not membership.has_left("ada", members)
    assert membership.has_left("ada", Members())
    assert not membership.has_left("ada", None)
