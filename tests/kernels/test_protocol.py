"""Jupyter's own suite for kernels, through the provisioner; and what debuggers and other languages need."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import jupyter_kernel_test
import pytest

from gateway_slurm.errors import KernelStartError
from helpers.kernel_clients import (
    KERNEL_NAMES,
    READY,
    execute,
    forget_service,
    install_both,
    install_kernelspec,
    job_state,
    jobid_of,
    jupyter_environment,
    running_kernel,
)
from helpers.private_slurm import poll, slurm


class IPyKernelSuite:
    """The properties of ipykernel for jupyter_kernel_test, and one kernel for all of its tests."""

    language_name = "python"
    file_extension = ".py"
    code_hello_world = "print('hello, world')"
    code_stderr = "import sys; print('oops', file=sys.stderr)"
    code_page_something = "print?"
    code_generate_error = "1 / 0"
    code_clear_output = "from IPython.display import clear_output; clear_output()"
    code_inspect_sample = "print"
    completion_samples = ({"text": "zi", "matches": {"zip"}}, {"text": "impor", "matches": {"import"}})
    complete_code_samples = ("1", "print('hello')", "def f(x):\n  return x*2\n\n\n")
    incomplete_code_samples = ("print('''hello", "def f(x):\n  x*2")
    invalid_code_samples = ("import = 7q",)
    code_execute_result = (
        {"code": "1+2+3", "result": "6"},
        {"code": "[n*n for n in range(1, 4)]", "result": "[1, 4, 9]"},
    )
    code_display_data = (
        {"code": "from IPython.display import HTML, display; display(HTML('<b>x</b>'))", "mime": "text/html"},
    )
    code_history_pattern = "1?2*"
    supported_history_operations = ("tail", "search")  # as in ipykernel's own run of this suite

    @classmethod
    def setUpClass(cls):
        """Start the kernel; pytest's fixtures that are not the session's come later than this."""
        cls.base = Path(tempfile.mkdtemp(prefix="gsk-", dir="/tmp"))
        cls.patch = pytest.MonkeyPatch()
        for name, value in jupyter_environment(cls.base).items():
            cls.patch.setenv(name, value)
        install_both(cls.base / "path")
        forget_service()
        super().setUpClass()

    @classmethod
    def tearDownClass(cls):
        """Stop the kernel; its job goes."""
        jobid = jobid_of(cls.km)
        super().tearDownClass()
        forget_service()
        gone = poll(lambda: job_state(jobid) == "", timeout=15)
        cls.patch.undo()
        shutil.rmtree(cls.base)
        assert gone


@pytest.mark.usefixtures("cluster")
class TestTunnel(IPyKernelSuite, jupyter_kernel_test.KernelTests):
    """jupyter_kernel_test through the tunnel."""

    kernel_name = KERNEL_NAMES["tunnel"]


@pytest.mark.usefixtures("cluster")
class TestDirect(IPyKernelSuite, jupyter_kernel_test.KernelTests):
    """jupyter_kernel_test by CurveZMQ."""

    kernel_name = KERNEL_NAMES["direct"]


def control_reply(client, msg_type, content):
    """Send a request on the control channel and return its reply."""
    message = client.session.msg(msg_type, content)
    client.control_channel.send(message)
    while True:
        reply = client.get_control_msg(timeout=READY)
        if reply["parent_header"].get("msg_id") == message["header"]["msg_id"]:
            return reply


def debug(client, sequence, command, arguments=None):
    """A request of the debug adapter protocol; returns the response."""
    request = {"type": "request", "seq": sequence, "command": command, "arguments": arguments or {}}
    response = control_reply(client, "debug_request", request)["content"]
    assert response.get("success"), response
    return response


def test_the_debugger_attaches_and_stops_at_a_breakpoint(service, kernel_name):
    """Debug requests on the control channel are answered: attach, a breakpoint, its variables, go on."""
    with running_kernel(kernel_name) as (_manager, client):
        initialize = {
            "clientID": "test",
            "adapterID": "",
            "pathFormat": "path",
            "linesStartAt1": True,
            "columnsStartAt1": True,
            "supportsVariableType": True,
        }
        assert debug(client, 1, "initialize", initialize)["body"]["supportsSetVariable"]
        debug(client, 2, "attach")
        code = "seen = 41\nseen += 1\nprint(seen)"
        source = debug(client, 3, "dumpCell", {"code": code})["body"]["sourcePath"]
        breakpoints = {"breakpoints": [{"line": 2}], "source": {"path": source}, "sourceModified": False}
        assert debug(client, 4, "setBreakpoints", breakpoints)["body"]["breakpoints"][0]["verified"]
        debug(client, 5, "configurationDone")
        client.execute(code)
        event = wait_for_event(client, "stopped")
        assert event["body"]["reason"] == "breakpoint"
        variables = debug(client, 6, "inspectVariables")["body"]["variables"]
        assert {"name": "seen", "value": "41"}.items() <= next(v for v in variables if v["name"] == "seen").items()
        debug(client, 7, "continue", {"threadId": event["body"]["threadId"]})
        while client.get_iopub_msg(timeout=READY)["content"].get("text") != "42\n":
            pass
        debug(client, 8, "disconnect", {"restart": False, "terminateDebuggee": True})


def wait_for_event(client, name):
    """The debugger's next event of this name, which comes by iopub."""
    while True:
        message = client.get_iopub_msg(timeout=READY)
        if message["msg_type"] == "debug_event" and message["content"]["event"] == name:
            return message["content"]


BASH = [sys.executable, "-m", "bash_kernel", "-f", "{connection_file}"]


def test_a_kernel_of_another_language_runs(service, kernelspecs):
    """bash_kernel, whose language is not Python: executes, is interrupted, restarted and shut down."""
    install_kernelspec(kernelspecs, "bash", config_overrides={"kernel_argv": BASH}, spec_overrides={"language": "bash"})
    with running_kernel("bash") as (manager, client):
        assert execute(client, 'echo "job $SLURM_JOB_ID" $((6 * 7))') == f"job {manager.provisioner.jobid} 42"
        msg_id = client.execute("kept=5; echo be''gun; sleep 300", stop_on_error=False)
        while "begun" not in str(client.get_iopub_msg(timeout=READY)["content"].get("text")):
            pass
        manager.interrupt_kernel()
        while client.get_shell_msg(timeout=READY)["parent_header"]["msg_id"] != msg_id:
            pass
        assert execute(client, "echo $kept") == "5"
        manager.restart_kernel()
        client.wait_for_ready(timeout=READY)
        assert execute(client, "echo [$kept]") == "[]"


# A kernel that knows no Unix sockets, as those in other languages: it refuses the connection file.
NO_IPC = """
import json, sys
info = json.load(open(sys.argv[1]))
if info["transport"] != "tcp":
    sys.exit("unknown transport " + info["transport"])
from ipykernel.kernelapp import launch_new_instance
launch_new_instance(["-f", sys.argv[1]])
"""
NO_IPC_ARGV = [sys.executable, "-c", NO_IPC, "{connection_file}"]


def test_a_kernel_that_cannot_use_unix_sockets_runs_behind_the_tunnel(kernelspecs, admin_settings):
    """It gets loopback TCP on its node; clients see no difference, and it restarts as others do."""
    admin_settings(loopback_kernels="always")
    install_kernelspec(
        kernelspecs,
        "no-ipc",
        config_overrides={"kernel_argv": NO_IPC_ARGV},
        spec_overrides={"language": "other"},
    )
    with running_kernel("no-ipc") as (manager, client):
        assert manager.get_connection_info()["transport"] == "ipc"
        assert execute(client, "print(6 * 7)") == "42"
        manager.restart_kernel()
        client.wait_for_ready(timeout=READY)
        assert execute(client, "print(6 * 7)") == "42"


def test_a_kernel_listens_on_loopback_only_where_its_job_has_its_nodes_for_itself(service, kernelspecs, cluster):
    """Other users of a node could read it; the error names what the user, and what the admin, can do."""
    config = {"kernel_argv": NO_IPC_ARGV}
    install_kernelspec(kernelspecs, "no-ipc", config_overrides=config, spec_overrides={"language": "other"})
    with (
        pytest.raises(KernelStartError, match=r"Unix sockets.*--exclusive.*loopback_kernels"),
        running_kernel("no-ipc"),
    ):
        pass
    argv = ("sbatch", "--parsable", "--exclusive", "-t5", "-o/dev/null", "--wrap", "sleep 300")
    jobid = slurm(*argv, cluster=cluster).stdout.strip()
    config["jobid"] = jobid
    install_kernelspec(kernelspecs, "no-ipc", config_overrides=config, spec_overrides={"language": "other"})
    try:
        with running_kernel("no-ipc") as (_manager, client):
            assert execute(client, "print(6 * 7)") == "42"
    finally:
        slurm("scancel", jobid, cluster=cluster)
