"""``jupyter slurm doctor``: what it finds, what it fixes, and what it leaves alone, on the real Slurm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

from gateway_slurm.allocations.identity import COMMENT, new_launcher_id
from gateway_slurm.link.tunnel import this_host
from gateway_slurm.store import Registry
from helpers.failing_starts import wrapped_command
from helpers.kernel_clients import READY, job_state
from helpers.private_slurm import poll, slurm
from helpers.server_processes import server

# A server that writes rows and is killed.
DEAD_SERVER = """
    import os, sys
    from gateway_slurm.store import AllocationRecord, Registry
    registry = Registry.default()
    registry.open()
    for jobid, launcher_id, kernel in (word.split(":") for word in sys.argv[1:]):
        kernel_ids = [kernel] if kernel else []
        record = AllocationRecord(launcher_id=launcher_id, jobid=jobid, identity=launcher_id, kernel_ids=kernel_ids)
        registry.put(record)
    registry.flush()
    print(registry.store_id)
    sys.stdout.flush()
    os._exit(0)
"""
NO_PROCESS = 4_194_304  # more than any process id can be (proc(5), pid_max)


@pytest.fixture(autouse=True)
def home(service, tmp_path, monkeypatch) -> Path:
    """A store, marks, sockets and connection files of the test's own."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    (tmp_path / "runtime").mkdir()
    with tempfile.TemporaryDirectory(prefix="gst-", dir="/tmp") as sockets:
        monkeypatch.setenv("TMPDIR", sockets)
        yield Path(sockets)


def dead_server(*rows: str) -> str:
    """Leave rows (``jobid:launcher_id:kernel_id``) behind; return the store's id."""
    argv = [sys.executable, "-c", textwrap.dedent(DEAD_SERVER), *rows]
    return subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True, timeout=READY).stdout.strip()


def submit(cluster, launcher_id: str) -> str:
    """Submit a job that is named as this package names its jobs, and only sleeps; return its id once it runs."""
    comment = f"--comment={COMMENT}{launcher_id}"
    argv = ("sbatch", "--parsable", "--job-name=a.ipynb", comment, "-o/dev/null", "--wrap", "sleep 300")
    jobid = slurm(*argv, cluster=cluster).stdout.strip()
    assert poll(lambda: job_state(jobid) == "RUNNING", timeout=READY)
    return jobid


def doctor(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the doctor without its path check, as its user does."""
    argv = [sys.executable, "-m", "gateway_slurm.cli.app", "doctor", "--no-walk", *arguments]
    return subprocess.run(argv, capture_output=True, text=True, timeout=READY, check=False)


def findings(*arguments: str, status: int) -> list[dict[str, object]]:
    """The doctor's findings; it must end with this exit status."""
    ran = doctor("--json", *arguments)
    assert ran.returncode == status, (ran.stdout, ran.stderr)
    return json.loads(ran.stdout)["findings"]


def kinds(found: list[dict[str, object]]) -> list[str]:
    """The kinds of the findings, sorted."""
    return sorted(str(finding["kind"]) for finding in found)


def test_it_reports_that_nothing_is_left_and_what_it_checked():
    """The exit status is 0; the store, Slurm and the address are named."""
    ran = doctor()
    assert (ran.returncode, ran.stderr) == (0, "")
    for words in ("Nothing is left", "store: ", "Slurm: it answers", "response address: "):
        assert words in ran.stdout


def test_files_marks_and_rows_that_are_left_are_found_and_removed(home, tmp_path):
    """Each is one line with what ``--fix`` would do. After ``--fix`` nothing is found."""
    dead_server("99999999:gs-1:k")
    marks = Registry.default().keep_flags
    marks.set("99999998", "gs-2")
    sockets = home / f"gs-server{NO_PROCESS}-{this_host()}-abc"
    sockets.mkdir()
    connection = tmp_path / "runtime" / "kernel-1.json"
    of_this_host = f"{home}/gs-server{NO_PROCESS}-{this_host()}-old/ab"
    connection.write_text(json.dumps({"transport": "ipc", "ip": of_this_host, "key": "x"}))
    other = tmp_path / "runtime" / "kernel-2.json"
    other.write_text(json.dumps({"transport": "tcp", "ip": "127.0.0.1"}))
    elsewhere = tmp_path / "runtime" / "kernel-3.json"
    of_another_host = f"{home}/gs-server{NO_PROCESS}-{'0' * 6}-old/ab"
    elsewhere.write_text(json.dumps({"transport": "ipc", "ip": of_another_host, "key": "x"}))
    ran = doctor()
    assert ran.returncode == 1
    assert len([line for line in ran.stdout.splitlines() if "; --fix removes" in line]) == 4
    assert "job 99999999, which is over, with 1 kernels" in ran.stdout
    assert sockets.exists()
    assert kinds(findings("--fix", status=0)) == ["connection", "mark", "row", "sockets"]
    assert not sockets.exists()
    assert not connection.exists()
    assert (other.exists(), elsewhere.exists()) == (True, True)
    assert (marks.all(), Registry.default().all_allocations()) == (frozenset(), [])
    assert findings(status=0) == []


def test_a_job_that_no_row_knows_is_cancelled_once_a_server_would_have_come_back(admin_settings, cluster):
    """Until then the doctor says how long the job is left; afterwards ``--fix`` cancels it."""
    store_id = dead_server()
    job = submit(cluster, new_launcher_id(store_id))
    (found,) = findings("--fix", status=1)
    assert "has no record of the job" in str(found["what"])
    assert "may take it over" in str(found["fix"])
    assert job_state(job) == "RUNNING"
    admin_settings(orphan_timeout=0.1)
    (found,) = findings(status=1)
    assert (found["fix"], found["can_fix"]) == ("cancels it", True)
    (found,) = findings("--fix", status=0)
    assert found["mended"]
    assert poll(lambda: job_state(job) == "", timeout=READY)


def test_a_dead_servers_job_is_reported_with_its_kernels_and_left(cluster):
    """The doctor does not know when that server died. The launcher does, and ends the job in time."""
    launcher_id = new_launcher_id("0" * 32)
    job = submit(cluster, launcher_id)
    dead_server(f"{job}:{launcher_id}:k")
    (found,) = findings("--fix", status=1)
    assert f"job {job} belongs to a dead server; its kernels (1) are out of reach" in str(found["what"])
    assert job_state(job) == "RUNNING"
    slurm("scancel", job, cluster=cluster)


def test_jobs_of_living_servers_and_of_other_stores_are_left_alone(admin_settings, cluster):
    """However old they are: a server of the other store, on any machine, may still use them."""
    admin_settings(orphan_timeout=0.1)
    theirs = submit(cluster, new_launcher_id("f" * 32))
    with server() as living:
        ran = doctor("--fix")
        assert (ran.returncode, ran.stderr) == (0, ""), ran.stdout
        assert f"job {theirs} belongs to a server of another store" in ran.stdout
        assert job_state(living.jobid) == job_state(theirs) == "RUNNING"
        living.end("in good order")
    slurm("scancel", theirs, cluster=cluster)


def test_a_state_directory_that_others_can_read_is_closed():
    """It holds secrets of all kernels."""
    dead_server()
    directory = Registry.default().directory
    directory.chmod(0o755)
    (found,) = findings("--fix", status=0)
    assert (found["kind"], directory.stat().st_mode & 0o777) == ("mode", 0o700)


def test_without_an_answer_from_slurm_the_rest_is_checked(home, admin_settings, tmp_path):
    """The exit status says that not everything could be checked."""
    dead_server("12:gs-1:")
    (home / f"gs-server{NO_PROCESS}-{this_host()}-abc").mkdir()
    words = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
    admin_settings(slurm_path=wrapped_command(tmp_path / "bin", "squeue", f"echo '{words}' >&2; exit 1"))
    ran = doctor("--fix")
    assert ran.returncode == 2
    assert "Slurm does not answer" in ran.stderr
    assert not list(home.iterdir())
    assert len(Registry.default().all_allocations()) == 1


def test_a_damaged_store_is_reported_and_left_as_it_is(tmp_path):
    """The admin may restore it from a backup."""
    dead_server("12:gs-1:")
    (file,) = (tmp_path / "state" / "gateway_slurm").glob("*/store.sqlite")
    for name in ("-wal", "-shm"):
        file.with_name(file.name + name).unlink(missing_ok=True)
    file.write_bytes(b"no database at all" * 1000)
    ran = doctor("--fix")
    assert ran.returncode == 2
    assert "the store cannot be used" in ran.stderr
    assert file.read_bytes() == b"no database at all" * 1000


def test_a_store_without_its_key_is_reported_and_no_new_key_is_made(tmp_path):
    """With another key its kernels could not be restored."""
    dead_server("12:gs-1:")
    (key,) = (path for path in (tmp_path / "state" / "gateway_slurm").glob("*") if path.is_file())
    key.unlink()
    ran = doctor("--fix")
    assert ran.returncode == 2
    assert "the store cannot be used" in ran.stderr
    assert not key.exists()


def test_an_address_that_no_launcher_can_dial_is_found(admin_settings):
    """Before a job runs whose launcher cannot connect."""
    admin_settings(response_address="no-such-host.invalid")
    (found,) = findings(status=1)
    assert "no-such-host.invalid" in str(found["what"])
    admin_settings(response_interface="nosuch0")
    (found,) = findings("--fix", status=1)
    assert "nosuch0" in str(found["what"])
    assert os.environ["XDG_STATE_HOME"]
