"""Whatever a client sends, and whatever a kernelspec says: what is started is within the project's limits."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway_slurm.errors import NotAllowed, RequestError
from gateway_slurm.gateway.specs.limits import (
    COUNTED,
    UNCOUNTED,
    check_request,
    client_environment,
    client_fields,
    merge_fields,
)
from gateway_slurm.gateway.specs.projects import CLIENT_FIELDS, NEVER_CLIENT_FIELDS, Limits, Project
from gateway_slurm.request import FIELDS, parse_request
from gateway_slurm.slurm.formats import memory_in_mebibytes, minutes

CONFIG = {"project": "demo", "partition": "batch", "nodes": "2", "runtime": 30, "gpus": "0", "kernel_name": "python3"}
LIMITS = Limits(max_nodes=4, max_gpus=4, max_cpus=16, max_memory=8192, max_runtime=60)
PROJECT = Project(name="demo", title="Demo", partitions=("batch", "gpu"), limits=LIMITS)
FREE = Project(name="free", title="Free")
EVERY = tuple(field.name for field in FIELDS if field.name not in NEVER_CLIENT_FIELDS)


def start(config=None, of=PROJECT, allowed=EVERY, **client):
    """The fields of a start, and the request that they are."""
    env = {f"KERNEL_SLURM_{name.upper()}": value for name, value in client.items()}
    fields = merge_fields(of, {**CONFIG, "memory": "1G", **(config or {})}, client_fields(env, allowed))
    return fields, check_request(fields, of)


def test_every_request_field_is_counted_or_known_to_need_no_count():
    """A new field is put into one of the two sets before it can be used where there are limits."""
    assert {field.name for field in FIELDS} == COUNTED | UNCOUNTED
    assert not COUNTED & UNCOUNTED
    assert set(CLIENT_FIELDS) <= {field.name for field in FIELDS}
    assert not NEVER_CLIENT_FIELDS & set(CLIENT_FIELDS)


def test_a_field_that_no_limit_knows_is_refused_where_there_are_limits(monkeypatch):
    """A new field that the limits do not know cannot bypass them."""
    monkeypatch.setattr("gateway_slurm.gateway.specs.limits.UNCOUNTED", UNCOUNTED - {"qos"})
    with pytest.raises(NotAllowed, match="bypass the limits"):
        start({"qos": "high"})
    start({"qos": "None"})
    start({"qos": "high"}, FREE)


# -- who wins -----------------------------------------------------------------------------------------


def test_the_client_wins_over_the_kernelspec_and_that_over_the_project():
    """Defaults are at the bottom; what is unset in a kernelspec, in any spelling, is not over them."""
    project = Project(name="p", title="P", account="money", partition="gpu", partitions=("batch", "gpu"))
    assert start({"project": "None", "partition": ""}, project)[1].project == "money"
    assert start({"project": "None", "partition": ""}, project)[1].partition == "gpu"
    assert start({}, project)[1].project == "demo"
    assert start({}, project)[1].partition == "batch"
    assert start({}, project, partition="gpu", nodes="3")[1].partition == "gpu"
    assert start({}, project, nodes="3")[1].nodes == 3


def test_the_only_partition_is_the_default():
    """A single partition need not be named."""
    project = Project(name="p", title="P", partitions=("gpu",))
    assert start({"partition": None}, project)[1].partition == "gpu"


@pytest.mark.parametrize("empty", ["", " ", "None"])
def test_a_client_that_sends_nothing_changes_nothing(empty):
    """An empty variable is no request, not even for a field that is not allowed."""
    assert start(nodes=empty, qos=empty, allowed=())[0] == start()[0]


def test_a_clients_runtime_counts_though_the_kernelspec_has_a_time():
    """``time`` would win over ``runtime``; the client's word wins over both, also once more over the kernelspec."""
    fields, request = start({"time": "0:50:00"}, runtime="20")
    assert request.minutes == 20
    assert parse_request({**CONFIG, "time": "0:50:00", **fields}).minutes == 20
    assert start({"time": "0:50:00"}, time="0:10:00", runtime="20")[1].minutes == 10


# -- what a client may set ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(NEVER_CLIENT_FIELDS))
def test_what_runs_is_never_the_clients(name):
    """Not even if an admin has put it into the list of allowed fields."""
    with pytest.raises(NotAllowed) as caught:
        client_fields({f"KERNEL_SLURM_{name.upper()}": "x"}, [*EVERY, *NEVER_CLIENT_FIELDS])
    assert caught.value.field == name


@pytest.mark.parametrize("name", ["project", "partition", "qos", "reservation", "constraint", "gres", "connect"])
def test_by_default_money_place_and_network_are_the_admins(name):
    """The message names the field, the value, and what may be set."""
    with pytest.raises(NotAllowed, match=f"(?i){name}.*'x'.*gpus") as caught:
        start(allowed=CLIENT_FIELDS, **{name: "x"})
    assert caught.value.field == name


def test_a_field_that_does_not_exist_is_invalid():
    """A wrong name is the client's mistake, not a matter of permission."""
    with pytest.raises(RequestError, match="KERNEL_SLURM_GPU: ") as caught:
        client_fields({"KERNEL_SLURM_GPU": "1"}, EVERY)
    assert not isinstance(caught.value, NotAllowed)


@pytest.mark.parametrize(("name", "value"), [("nodes", "many"), ("time", "soon"), ("node", "-a"), ("nodes", ["2"])])
def test_a_value_that_is_none_is_invalid(name, value):
    """Before any limit is looked at."""
    with pytest.raises(RequestError) as caught:
        start(**{name: value})
    assert not isinstance(caught.value, NotAllowed)
    assert caught.value.field == name


# -- limits ---------------------------------------------------------------------------------------------

TOO_MUCH = [
    ("nodes", {"nodes": "5"}),
    ("gpus", {"gpus": "3"}),  # on two nodes
    ("gpus", {"gpus": "2", "nodes": "3"}),
    ("gpus", {"gres": "gpu:3"}),
    ("gpus", {"gres": "gpu:a100:3"}),
    ("gpus", {"gres": "GPU:A100:3"}),
    ("gpus", {"gres": "gres/gpu:3"}),
    ("gpus", {"gres": "gres:gpu:3"}),
    ("gpus", {"gres": "gpu=3"}),
    ("gpus", {"gres": "gpu:1,gpu:v100:2"}),
    ("gpus", {"gres": "tape:1,gpu:2", "gpus": "1"}),
    ("gpus", {"gres": "gpu,gpu:a,shard:100"}),
    ("gpus", {"gres": "gpu:4090"}),
    ("gres", {"gres": "gpu:2k"}),
    ("gres", {"gres": "gpu:3g.20gb"}),
    ("gres", {"gres": "gpu:"}),
    ("gres", {"gres": "gpu:+3"}),
    ("cpus", {"cpus": "9"}),
    ("memory", {"memory": "5G"}),
    ("memory", {"memory": "4097"}),
    ("memory", {"memory": "0"}),
    ("memory", {"memory": "0G"}),
    ("memory", {"memory": "1T"}),
    ("runtime", {"runtime": "61"}),
    ("time", {"time": "61"}),
    ("time", {"time": "1-0"}),
    ("time", {"time": "1:00:01"}),
    ("time", {"time": "UNLIMITED"}),
    ("time", {"time": "2:00:00", "runtime": "5"}),
    ("runtime", {"time": "5", "runtime": "120"}),
    ("partition", {"partition": "huge"}),
    ("partition", {"partition": "batch,huge"}),
    ("partition", {"partition": "batch,"}),
    ("partition", {"partition": "Batch"}),
]


@pytest.mark.parametrize("who", ["client", "kernelspec"])
@pytest.mark.parametrize(("field", "asked"), TOO_MUCH)
def test_too_much_is_refused_by_name_for_each_user(field, asked, who):
    """The message has the field, the project and what it allows; a kernelspec is held to it as well."""
    with pytest.raises(NotAllowed, match="demo") as caught:
        start(**asked) if who == "client" else start(asked)
    assert caught.value.field == field
    free = Project(name="free", title="Free")
    assert start(asked, free)[1]


@pytest.mark.parametrize(
    "asked",
    [
        {"nodes": "4"},
        {"gpus": "2"},
        {"gpus": "4", "nodes": "1"},
        {"gres": "gpu:a100:2"},
        {"gres": "gpu:3g.20gb:2"},
        {"gres": "gpu,gpu:a100"},
        {"gres": "tape:50"},
        {"gres": "shard:8"},
        {"cpus": "8"},
        {"memory": "4G"},
        {"memory": "8192", "nodes": "1"},
        {"runtime": "60"},
        {"time": "1:00:00"},
        {"partition": "gpu,batch"},
    ],
)
def test_what_is_just_within_the_limits_is_allowed(asked):
    """A limit is what may be had."""
    assert start(**asked)[1]


def test_no_gpus_means_no_share_of_one_either():
    """A project with a limit of 0 GPUs gets no shards."""
    project = Project(name="p", title="P", limits=Limits(max_gpus=0))
    for gres in ("shard:1", "mps:10", "gpu"):
        with pytest.raises(NotAllowed):
            start({"gres": gres}, project)
    assert start({"gres": "tape:1"}, project)[1]


def test_memory_that_is_not_said_can_be_all_of_a_node():
    """Where memory is limited it has to be asked for; in a job that is there already nothing is added."""
    fields = merge_fields(PROJECT, CONFIG, {})
    with pytest.raises(NotAllowed, match="memory") as caught:
        check_request(fields, PROJECT)
    assert caught.value.field == "memory"
    assert check_request({**fields, "jobid": "12"}, PROJECT)


# -- whatever a client sends ------------------------------------------------------------------------------

numbers = st.integers(0, 2_000_000).map(str) | st.sampled_from(
    ["", "None", "0", "1", "2", "4", "16", " 3 ", "-1", "1e3"]
)
gres = st.lists(
    st.builds(
        "".join,
        st.tuples(
            st.sampled_from(["", "gres/", "gres:", "GRES/"]),
            st.sampled_from(["gpu", "GPU", "shard", "tape", "mps"]),
            st.sampled_from(["", ":a100", ":3g.20gb", "/x", "=2", ":"]),
            st.sampled_from(["", ":1", ":2", ":99", "=4", ":2k", ":0"]),
        ),
    ),
    max_size=3,
).map(",".join)
values = {
    "nodes": numbers,
    "gpus": numbers,
    "cpus": numbers,
    "runtime": numbers,
    "memory": st.builds(lambda n, unit: n + unit, numbers, st.sampled_from(["", "K", "M", "G", "T", "GB", "k", "kb"])),
    "time": numbers
    | st.sampled_from(["UNLIMITED", "infinite", "1-0", "0:30:00", "59:59", "60:00", "60:01", "0-1:00", "0-1:00:01"]),
    "gres": gres,
    "partition": st.lists(st.sampled_from(["batch", "gpu", "huge", "", " batch", "BATCH"]), max_size=3).map(",".join),
    "jobid": st.sampled_from(["12", "12_3", "x"]),
    "share": st.sampled_from(["true", "no", "?"]),
    "isolate": st.sampled_from(["1", "0"]),
}
# Few fields at a time, and mostly allowed ones, so that a good part is let through.
requests = st.sets(st.sampled_from(sorted(values)), max_size=3).flatmap(
    lambda names: st.fixed_dictionaries({name: values[name] for name in names})
)
allowances = st.just(set(values)) | st.sets(st.sampled_from(sorted(values)))


@given(client=requests, spec=requests, allowed=allowances)
@example(client={"time": "UNLIMITED"}, spec={}, allowed={"time"})
@example(client={"gres": "GRES/GPU:a100:99"}, spec={}, allowed={"gres"})
@example(client={}, spec={"jobid": "12", "partition": ""}, allowed=set())
@example(client={}, spec={"jobid": "12", "runtime": ""}, allowed=set())
def test_nothing_that_is_let_through_is_beyond_the_limits(client, spec, allowed):
    """An independent count: the request for sbatch, with the kernelspec's fields, is within the project's limits."""
    config = {**CONFIG, "memory": "1G", **spec}
    env = {f"KERNEL_SLURM_{name.upper()}": value for name, value in client.items()}
    try:
        fields = merge_fields(PROJECT, config, client_fields(env, allowed))
        check_request(fields, PROJECT)
    except RequestError:
        return
    # The provisioner puts the result over the kernelspec's fields, and parses the whole.
    request = parse_request({**config, **fields})
    for name, value in client.items():
        if name not in allowed and value.strip() not in ("", "None"):
            raise AssertionError(f"{name} was let through")
    nodes = request.nodes or 1
    assert nodes <= 4
    gpus = 0
    for item in request.gres_list:
        words = [word for word in item.lower().replace("/", ":").replace("=", ":").split(":") if word != "gres"]
        if words[0] == "gpu":
            gpus += int(words[-1]) if words[-1].isdigit() else 1
    assert gpus * nodes <= 4
    assert (request.cpus or 1) * nodes <= 16
    if request.jobid is None or request.memory is not None:
        assert 0 < memory_in_mebibytes(request.memory) * nodes <= 8192
    if request.jobid is None or request.time_limit is not None:
        assert 0 < int(minutes(str(request.time_limit)) or 10**9) <= 60
    if request.jobid is None or request.partition is not None:
        # An existing job has its partition already.
        assert set((request.partition or "").split(",")) <= {"batch", "gpu"}


# -- the environment --------------------------------------------------------------------------------------


def test_kernels_get_the_clients_kernel_variables_and_what_is_allowed():
    """As with Enterprise Gateway; no request fields, nothing else."""
    env = {
        "KERNEL_USERNAME": "ada",
        "KERNEL_WORKING_DIR": "/home/ada",
        "KERNEL_SLURM_GPUS": "1",
        "PATH": "/bin",
        "LC_ALL": "C",
        "LANG": "C",
        "SLURM_JOB_ID": "1",
    }
    assert client_environment(env, ["LC_*", "SLURM_*"]) == {
        "KERNEL_USERNAME": "ada",
        "KERNEL_WORKING_DIR": "/home/ada",
        "LC_ALL": "C",
    }


@pytest.mark.parametrize(
    "name", ["KERNEL_AUTH_TOKEN", "KERNEL_GITHUB_SECRET", "KERNEL_PASSWORD", "KERNEL_api_key", "KERNEL_AWS_CREDENTIALS"]
)
def test_what_is_called_a_secret_stays_out_unless_it_is_allowed_by_name(name):
    """A glob does not let it through; its full name does, which an admin wrote."""
    assert client_environment({name: "x"}, ["KERNEL_*"]) == {}
    assert client_environment({name: "x"}, [name]) == {name: "x"}


@pytest.mark.parametrize("value", [5, None, ["a"], {"a": 1}, "a\0b", "x" * 200_000])
def test_a_variable_that_cannot_be_one_is_invalid(value):
    """JSON can hold what no environment can."""
    with pytest.raises(RequestError, match="KERNEL_X"):
        client_environment({"KERNEL_X": value}, [])
