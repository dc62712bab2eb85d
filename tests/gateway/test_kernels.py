"""``jupyter slurm gateway`` as its users have it: kernels, sessions, allocations, limits, health, its end."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import uuid

import pytest

from gateway_slurm.gateway.specs.projects import CLIENT_FIELDS
from helpers.gateway_process import JUPYTER_SLURM, ask, running_gateway, start, stop, stop_all, until_dead
from helpers.kernel_clients import JOB, READY, poll_async
from helpers.notebook_server import V1, Frontend
from helpers.private_slurm import jobs_of, slurm

OPTIONS = [
    "--GatewayKernelSpecManager.allowed_envs=['COLOUR']",
    "--GatewayIdentityProvider.metrics_users=['portal']",
    # Also that users may keep allocations.
    f"--GatewayKernelSpecManager.allowed_client_fields={[*CLIENT_FIELDS, 'keep_allocation']}",
]


@pytest.fixture(scope="module")
def module_gateway(gateway_environment):
    """One gateway for the tests here."""
    with running_gateway(gateway_environment / "gateway", *OPTIONS) as gateway:
        yield gateway


@pytest.fixture
def gateway(module_gateway, kernelspecs):
    """The gateway, with kernelspecs."""
    return module_gateway


@pytest.fixture
def alice(gateway):
    """The gateway as one user has it."""
    return gateway.of("alice")


# -- kernels ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["", V1], ids=["json", "v1"])
async def test_a_kernels_whole_life_goes_through_the_gateway(gateway, alice, kernel_name, protocol):
    """Start, execute, interrupt, restart in the same job, delete, by REST and either websocket protocol."""
    kernel_id = await start(alice, kernel_name)
    frontend = await Frontend.connect(alice, kernel_id, protocol)
    _reply, jobid = await frontend.execute(JOB)
    model = await alice.json("GET", f"/api/kernels/{kernel_id}")
    connect, directory = model["slurm"].pop("connect"), model["slurm"].pop("directory")
    assert (directory["path"].startswith("/"), directory["why"]) == (True, "")
    assert model["slurm"] == {"jobid": jobid, "node": "c1"}
    assert (connect["mode"], bool(connect["why"])) == ("direct" if "direct" in kernel_name else "tunnel", True)
    sleeping = await frontend.begin("import time; kept = 1; print('begun', flush=True); time.sleep(300)", "begun")
    await alice.request("POST", f"/api/kernels/{kernel_id}/interrupt")
    assert (await frontend.result(sleeping))[0]["ename"] == "KeyboardInterrupt"
    await alice.request("POST", f"/api/kernels/{kernel_id}/restart")
    assert (await frontend.execute("print('kept' in globals())"))[1] == "False"
    assert (await frontend.execute(JOB))[1] == jobid
    logs = await alice.json("GET", f"/api/kernels/{kernel_id}/logs")
    assert set(logs) == {"kernel", "launcher"}
    assert "To connect another client to this kernel" in logs["kernel"]
    assert await gateway.of("bob").status("GET", f"/api/kernels/{kernel_id}/logs") == 404
    await stop(alice, kernel_id)
    await frontend.until_closed()
    assert await alice.status("GET", f"/api/kernels/{kernel_id}") == 404


async def test_a_client_sends_its_kernel_what_is_named_kernel_or_allowed(alice, cluster):
    """KERNEL_* and allowed variables arrive; others, and request fields, do not."""
    env = {
        "KERNEL_COLOUR": "green",
        "COLOUR": "red",
        "LD_PRELOAD": "/nowhere.so",
        "KERNEL_API_TOKEN": "secret",
        "KERNEL_SLURM_RUNTIME": "7",
    }
    kernel_id = await start(alice, env=env)
    names = sorted(env)
    printed = await ask(alice, kernel_id, f"import os; print({{n: os.environ.get(n) for n in {names}}})")
    arrived = {name: env[name] if name in ("KERNEL_COLOUR", "COLOUR") else None for name in names}
    assert printed == str(arrived)
    assert slurm("squeue", "--noheader", "--format=%l", cluster=cluster).stdout.strip() == "7:00"
    await stop(alice, kernel_id)


async def test_a_request_within_the_projects_limits_is_started(alice):
    """The project's kernelspec takes the client's runtime up to its limit."""
    kernel_id = await start(alice, "physics.python", env={"KERNEL_SLURM_RUNTIME": "30"})
    assert await ask(alice, kernel_id, "print(6 * 7)") == "42"
    await stop(alice, kernel_id)


@pytest.mark.parametrize(
    ("env", "status", "words"),
    [
        ({"KERNEL_SLURM_RUNTIME": "31"}, 403, ["runtime", "max_runtime=30", "physics"]),
        ({"KERNEL_SLURM_QOS": "high"}, 403, ["qos", "may not set"]),
        ({"KERNEL_SLURM_RUNTIME": "long"}, 400, ["runtime", "long"]),
        ({"KERNEL_SLURM_COLOUR": "red"}, 400, ["colour"]),
        ({"KERNEL_SLURM_KERNEL_ARGV": "['sh']"}, 403, ["kernel_argv"]),
        ({"KERNEL_USERNAME": "bob"}, 403, ["bob", "alice"]),
    ],
)
async def test_a_request_beyond_what_is_allowed_is_told_the_field_and_the_limit(alice, env, status, words):
    """Nothing is submitted, and the answer's message says which field of what limit it was."""
    got, body = await alice.refusal("POST", "/api/kernels", {"name": "physics.python", "env": env})
    assert got == status
    for word in words:
        assert word in json.loads(body)["message"]
    assert await alice.json("GET", "/api/kernels") == []


async def test_an_unknown_kernelspec_is_not_found(alice):
    """As 404, with its name, for kernels and sessions alike."""
    for path, body in (
        ("/api/kernels", {"name": "nowhere"}),
        ("/api/sessions", {"path": "a.ipynb", "kernel": {"name": "nowhere"}}),
        ("/api/kernels", {"name": "../../etc"}),
    ):
        status, text = await alice.refusal("POST", path, body)
        assert (status, body.get("name", "nowhere") in text) == (404, True)


@pytest.mark.parametrize(
    "body",
    [
        "x",
        [],
        {"name": 7},
        {"name": "slurm", "env": []},
        {"name": "slurm", "env": {"KERNEL_A": 1}},
        {"name": "slurm", "kernel_id": "../x"},
        {"name": "slurm", "env": {"KERNEL_WORKING_DIR": "\0"}},
        {"name": "slurm", "env": {"KERNEL_USERNAME": "-x y"}},
    ],
    ids=str,
)
async def test_a_body_that_is_wrong_is_refused(alice, body):
    """As 400, and no kernel is there afterwards."""
    assert await alice.status("POST", "/api/kernels", body) == 400
    assert await alice.json("GET", "/api/kernels") == []


async def test_kernelspecs_are_listed_with_their_projects(alice):
    """Installed ones by their name, a project's behind the project's name."""
    listed = await alice.json("GET", "/api/kernelspecs")
    assert set(listed["kernelspecs"]) == {"slurm", "slurm-direct", "physics.python"}
    assert listed["default"] in listed["kernelspecs"]
    one = await alice.json("GET", "/api/kernelspecs/physics.python")
    assert one == listed["kernelspecs"]["physics.python"]
    assert await alice.status("GET", "/api/kernelspecs/physics.other") == 404


async def test_who_names_no_kernelspec_gets_the_one_that_is_listed_as_default(alice):
    """Also where the admin's default is not served."""
    listed = await alice.json("GET", "/api/kernelspecs")
    model = await alice.json("POST", "/api/kernels", {})
    assert model["name"] == listed["default"]
    await stop(alice, model["id"])


# -- sessions -----------------------------------------------------------------------------------------


async def test_a_document_has_one_session(alice):
    """The same path twice is one session with one kernel, which goes with it."""
    body = {"path": "work/a.ipynb", "name": "a.ipynb", "type": "notebook", "kernel": {"name": "slurm"}}
    first = await alice.json("POST", "/api/sessions", body)
    again = await alice.json("POST", "/api/sessions", body)
    assert (again["id"], again["kernel"]["id"]) == (first["id"], first["kernel"]["id"])
    assert [one["id"] for one in await alice.json("GET", "/api/sessions")] == [first["id"]]
    kernel_id = first["kernel"]["id"]
    assert await ask(alice, kernel_id, "import os; print(os.environ['JPY_SESSION_NAME'])") == "work/a.ipynb"
    await alice.request("DELETE", f"/api/sessions/{first['id']}")
    assert await alice.status("GET", f"/api/sessions/{first['id']}") == 404
    assert await alice.json("GET", "/api/kernels") == []


async def test_overlapping_posts_of_a_document_are_one_session(alice):
    """Ten at once get the same session and start one kernel."""
    body = {"path": "b.ipynb", "name": "b.ipynb", "type": "notebook", "kernel": {"name": "slurm"}}
    sessions = await asyncio.gather(*(alice.json("POST", "/api/sessions", body) for _ in range(10)))
    assert len({one["id"] for one in sessions}) == 1
    assert len(await alice.json("GET", "/api/kernels")) == 1
    await alice.request("DELETE", f"/api/sessions/{sessions[0]['id']}")


async def test_a_session_can_be_renamed_and_given_another_kernel(alice):
    """PATCH ends the kernel that the session had, and keeps one that it names again."""
    body = {"path": "c.ipynb", "name": "c.ipynb", "type": "notebook", "kernel": {"name": "slurm"}}
    session = await alice.json("POST", "/api/sessions", body)
    path, before = f"/api/sessions/{session['id']}", session["kernel"]["id"]
    renamed = await alice.json("PATCH", path, {"path": "d.ipynb", "name": "d.ipynb"})
    assert (renamed["path"], renamed["kernel"]["id"]) == ("d.ipynb", before)
    assert (await alice.json("PATCH", path, {"kernel": {"id": before}}))["kernel"]["id"] == before
    other = await alice.json("PATCH", path, {"kernel": {"name": "slurm-direct", "id": None}})
    assert other["kernel"]["name"] == "slurm-direct"
    assert [one["id"] for one in await alice.json("GET", "/api/kernels")] == [other["kernel"]["id"]]
    mine = await start(alice)
    assert (await alice.json("PATCH", path, {"kernel": {"id": mine}}))["kernel"]["id"] == mine
    assert [one["id"] for one in await alice.json("GET", "/api/kernels")] == [mine]
    assert await alice.status("PATCH", path, {"kernel": {"id": str(uuid.uuid4())}}) == 404
    await alice.request("DELETE", path)


async def test_a_session_ends_with_its_kernel(alice):
    """A kernel that is deleted takes its session out of the list."""
    session = await alice.json("POST", "/api/sessions", {"path": "e.ipynb", "kernel": {"name": "slurm"}})
    await stop(alice, session["kernel"]["id"])
    assert await alice.json("GET", "/api/sessions") == []
    assert await alice.status("DELETE", f"/api/sessions/{session['id']}") == 404


# -- allocations --------------------------------------------------------------------------------------


async def test_an_allocation_is_kept_shared_and_cancelled(alice, cluster):
    """A kept one outlives its kernel, takes the next one by its id, and ends when it is cancelled."""
    first = await start(alice)
    jobid = await ask(alice, first, JOB)
    (listed,) = await alice.json("GET", "/api/allocations")
    assert (listed["jobid"], listed["state"], listed["kernel_ids"]) == (jobid, "RUNNING", [first])
    await alice.request("POST", f"/api/allocations/{jobid}/keep")
    await stop(alice, first)
    kept = await alice.json("GET", f"/api/allocations/{jobid}")
    assert (kept["kept"], kept["kernel_ids"]) == (True, [])
    second = await start(alice, env={"KERNEL_SLURM_JOBID": jobid})
    assert await ask(alice, second, JOB) == jobid
    await alice.request("DELETE", f"/api/allocations/{jobid}")
    assert await poll_async(lambda: jobs_of(cluster) == [], timeout=READY)
    await until_dead(alice, second)
    await stop(alice, second)
    assert await alice.status("GET", f"/api/allocations/{jobid}") == 404


async def test_an_allocation_that_is_released_ends(alice, cluster):
    """With its last kernel gone, at once."""
    kernel_id = await start(alice)
    jobid = await ask(alice, kernel_id, JOB)
    await alice.request("POST", f"/api/allocations/{jobid}/keep")
    await stop(alice, kernel_id)
    assert [line.split()[0] for line in jobs_of(cluster)] == [jobid]
    await alice.request("POST", f"/api/allocations/{jobid}/release")
    assert await poll_async(lambda: jobs_of(cluster) == [], timeout=READY)
    for verb, action in (("POST", "/keep"), ("POST", "/release"), ("DELETE", ""), ("GET", "")):
        assert await alice.status(verb, f"/api/allocations/{jobid}{action}") == 404


# -- limits, idle kernels, the end ------------------------------------------------------------------


async def test_limits_count_kernels_that_still_wait(gateway_environment, kernelspecs, cluster):
    """Starts of one moment and of one user come to no more than the limits; a place that is given up is free."""
    limits = ["--SlurmMappingKernelManager.max_kernels=3", "--SlurmMappingKernelManager.max_kernels_per_user=2"]
    with running_gateway(gateway_environment / "limits", *limits) as gateway:
        alice, bob = gateway.of("alice"), gateway.of("bob")
        answers = await asyncio.gather(*(alice.refusal("POST", "/api/kernels", {"name": "slurm"}) for _ in range(5)))
        assert sorted(status for status, _ in answers) == [201, 201, 429, 429, 429]
        assert "max_kernels_per_user" in next(body for status, body in answers if status == 429)
        statuses = [await bob.refusal("POST", "/api/kernels", {"name": "slurm"}) for _ in range(2)]
        assert [status for status, _ in statuses] == [201, 429]
        assert "max_kernels)" in statuses[1][1]
        await stop_all(alice)
        await stop(bob, await start(bob))
        await stop_all(bob)
        assert await poll_async(lambda: jobs_of(cluster) == [], timeout=READY)


@pytest.mark.slow
async def test_an_idle_kernel_is_culled_and_its_allocation_is_free(gateway_environment, kernelspecs, cluster):
    """No client deletes it: it disappears from the list, and its job from the queue."""
    culling = ["--SlurmMappingKernelManager.cull_idle_timeout=1", "--SlurmMappingKernelManager.cull_interval=1"]
    with running_gateway(gateway_environment / "culling", *culling) as gateway:
        alice = gateway.of("alice")
        kernel_id = await start(alice)
        assert await poll_async(lambda: jobs_of(cluster) != [], timeout=READY)
        assert await poll_async(lambda: jobs_of(cluster) == [], timeout=READY)
        assert await alice.status("GET", f"/api/kernels/{kernel_id}") == 404


async def test_a_gateway_that_kills_kernels_ends_them_and_itself_in_good_order(
    gateway_environment, kernelspecs, cluster
):
    """One kernel runs, one waits; both are gone with the process, whose exit status is 0."""
    with running_gateway(gateway_environment / "ending", "--kill-kernels") as gateway:
        alice, bob = gateway.of("alice"), gateway.of("bob")
        running, _waiting = await start(alice), await start(bob)
        frontend = await Frontend.connect(alice, running)
        await frontend.execute("1")
        gateway.process.send_signal(signal.SIGTERM)
        await frontend.until_closed()
        assert await asyncio.to_thread(gateway.process.wait, 30) == 0
        assert await poll_async(lambda: jobs_of(cluster) == [], timeout=READY)
        assert "Traceback" not in gateway.log.read_text()


# -- health, metrics, what there is not -----------------------------------------------------------------


async def test_health_says_live_and_ready_to_anybody(gateway):
    """Without a token, since those who ask have none."""
    assert json.loads((await gateway.anyone.request("GET", "/health/live")).body) == {"status": "live"}
    while (answer := await gateway.anyone.request("GET", "/health/ready", raise_error=False)).code == 503:
        assert "try again" in json.loads(answer.body)["reason"]
    assert json.loads(answer.body) == {"status": "ready"}


async def test_a_gateway_without_slurm_is_live_and_not_ready(gateway_environment, kernelspecs, tmp_path):
    """/health/ready is 503 and names what is missing."""
    with running_gateway(gateway_environment / "bare", environment={"PATH": str(tmp_path)}) as gateway:
        assert await gateway.anyone.status("GET", "/health/live") == 200
        reason = ""
        while "sbatch" not in reason:
            answer = await gateway.anyone.request("GET", "/health/ready", raise_error=False)
            assert (answer.code, answer.headers["Retry-After"]) == (503, "1")
            reason = json.loads(answer.body)["reason"]
            assert "sbatch" in reason or "try again" in reason


async def test_metrics_count_kernels_allocations_and_commands(gateway, alice):
    """In Prometheus' format, for admins and named users only; no user's name is in them unless the admin wants it."""
    kernel_id = await start(alice)
    await ask(alice, kernel_id, "1")
    metrics = (await gateway.of("portal").request("GET", "/metrics")).body.decode()
    assert 'gateway_slurm_kernels{state="idle"} 1.0' in metrics
    assert 'gateway_slurm_allocations{state="RUNNING"} 1.0' in metrics
    assert 'gateway_slurm_commands_total{command="sbatch"}' in metrics
    assert "alice" not in metrics
    assert await alice.status("GET", "/metrics", token="") == 403
    assert await alice.status("GET", "/metrics") == 403
    assert await gateway.of("carol").status("GET", "/metrics") == 200
    await stop(alice, kernel_id)


@pytest.mark.parametrize(
    "path",
    [
        "/api/contents",
        "/api/contents/a.txt",
        "/api/terminals",
        "/api/config/x",
        "/api/security/csp-report",
        "/api/shutdown",
        "/api/nbconvert",
        "/files/a.txt",
        "/nbconvert/html/a.ipynb",
        "/tree",
        "/lab",
        "/terminals/websocket/1",
        "/custom/custom.css",
        "/view/a",
        "/edit/a",
        "/notebooks/a.ipynb",
    ],
)
async def test_a_gateway_has_no_files_terminals_or_pages(alice, path):
    """Not for anybody, by any verb."""
    for verb in ("GET", "POST", "DELETE"):
        assert await alice.status(verb, path) in (404, 405)
    assert await alice.status("GET", path) == 404
    assert await alice.status("GET", path, token="") in (403, 404)


async def test_status_and_me_tell_a_user_what_is_theirs(alice):
    """Who they are, and how many kernels they have."""
    kernel_id = await start(alice)
    status = await alice.json("GET", "/api/status")
    assert (status["kernels"], status["connections"]) == (1, 0)
    assert (await alice.json("GET", "/api/me"))["identity"]["username"] == "alice"
    await stop(alice, kernel_id)


# -- the command line -------------------------------------------------------------------------------


def run(*argv):
    """A command that ends: its result."""
    return subprocess.run([*JUPYTER_SLURM, *argv], check=False, capture_output=True, text=True, timeout=READY)


def test_every_setting_is_in_the_help():
    """--help-all has the gateway's own settings, and those that jupyter_server has for kernels."""
    shown = run("gateway", "--help-all").stdout
    for setting in (
        "SlurmMappingKernelManager.max_kernels_per_user",
        "GatewayKernelSpecManager.projects_root",
        "GatewayIdentityProvider.tokens_file",
        "SlurmMappingKernelManager.cull_idle_timeout",
    ):
        assert setting in shown


@pytest.mark.slow
async def test_a_generated_config_loads(gateway_environment, kernelspecs, monkeypatch):
    """The file has every setting, as a comment; with one of them uncommented the gateway takes it from there."""
    directory = gateway_environment / "generated"
    directory.mkdir()
    monkeypatch.setenv("JUPYTER_CONFIG_DIR", str(directory))
    assert (await asyncio.to_thread(run, "gateway", "--generate-config")).returncode == 0
    (path,) = directory.glob("*.py")
    text = path.read_text()
    setting = "# c.SlurmMappingKernelManager.max_kernels_per_user = 0"
    assert setting in text
    path.write_text(text.replace(setting, "c.SlurmMappingKernelManager.max_kernels_per_user = 1"))
    with running_gateway(directory / "run") as gateway:
        alice = gateway.of("alice")
        kernel_id = await start(alice)
        assert await alice.status("POST", "/api/kernels", {"name": "slurm"}) == 429
        await stop(alice, kernel_id)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("c.SlurmGatewayApp.port = (", "gateway.py, line 1"),
        ("c.SlurmGatewayApp.port = nowhere", "gateway.py, line 1: NameError"),
        ("c.SlurmGatewayApp.port = 'many'", "port"),
        (None, "is no configuration file"),
    ],
)
def test_a_config_file_with_a_mistake_is_no_gateway_with_defaults(gateway_environment, tmp_path, text, words):
    """Limits and who is trusted may be in it: nothing is served without."""
    path = tmp_path / "gateway.py"
    if text is not None:
        path.write_text(text)
    done = run("gateway", f"--config={path}")
    assert done.returncode == 1
    assert words in done.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "no user could use the gateway"),
        (["--tokens={tokens}", "--GatewayKernelSpecManager.allowed_client_fields=['kernel_argv']"], "kernel_argv"),
    ],
)
def test_a_mistake_in_the_settings_is_told_at_the_start(gateway_environment, tmp_path, options, words):
    """The gateway says what is wrong and does not listen."""
    given = [option.format(tokens=tmp_path / "tokens.json") for option in options]
    ended = run("gateway", "--allow-root", "--port=0", *given)
    assert ended.returncode != 0
    assert words in ended.stderr
    assert "Traceback" not in ended.stderr
