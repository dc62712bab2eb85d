"""Kernelspecs that promise CurveZMQ for a kernel that listens in plain text, as ipykernel before 7.4 does."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path

from gateway_slurm.errors import NotEncrypted
from helpers.failing_starts import nothing_left, python_script, start_error
from helpers.kernel_clients import CURVE, execute, install_kernelspec, running_kernel
from helpers.private_slurm import poll

# Takes the Curve keys out of the connection file and runs ipykernel. Every file that a kernel got is kept.
IGNORES_KEYS = """
import json, os, sys
path, starts = sys.argv[1:3]
connection = json.load(open(path))
with open(starts, "a") as file:
    print(json.dumps(connection), file=file)
json.dump({k: v for k, v in connection.items() if not k.startswith("curve_")}, open(path, "w"))
os.execv(sys.executable, [sys.executable, "-m", "ipykernel_launcher", "-f", path])
"""


def promising(kernelspecs: Path, directory: Path, connect: str) -> tuple[str, Path]:
    """Install a kernelspec that promises too much; return its name, and the file of its kernels' connection files."""
    starts = directory / "starts"
    argv = [python_script(directory / "kernel", IGNORES_KEYS), "{connection_file}", str(starts)]
    install_kernelspec(
        kernelspecs, "promising", config_overrides={"kernel_argv": argv, "connect": connect}, spec_overrides=CURVE
    )
    return "promising", starts


def connections(starts: Path) -> list[dict[str, object]]:
    """What each kernel was started with."""
    return [json.loads(line) for line in starts.read_text().splitlines()]


def open_ports(connection: dict[str, object]) -> list[int]:
    """The ports in a connection file at which something listens."""
    ports = [int(str(value)) for name, value in connection.items() if name.endswith("_port")]
    assert len(ports) == 5
    found = []
    for port in ports:
        with socket.socket() as sock:
            if sock.connect_ex((str(connection["ip"]), port)) == 0:
                found.append(port)
    return found


def test_a_kernel_that_must_be_direct_and_speaks_plain_text_is_refused(service, cluster, kernelspecs, tmp_path):
    """The start fails with the reason and what to do, and none of the kernel's ports is open any more."""
    name, starts = promising(kernelspecs, tmp_path, "direct")
    error, _seconds = start_error(name)
    (connection,) = connections(starts)
    assert (connection["transport"], open_ports(connection)) == ("tcp", [])
    assert isinstance(error, NotEncrypted)
    assert [
        word for word in ("connect = direct", "supported_encryption", "ipykernel", "tunnel") if word not in str(error)
    ] == []
    assert nothing_left(cluster)


def test_a_kernel_that_may_be_direct_and_speaks_plain_text_gets_the_tunnel(service, kernelspecs, tmp_path):
    """It is ended and started again on Unix sockets, and says so; a restart does not try the ports again."""
    name, starts = promising(kernelspecs, tmp_path, "auto")
    with running_kernel(name) as (manager, client):
        plain, tunnelled = connections(starts)
        assert open_ports(plain) == []
        assert tunnelled["transport"] == "ipc"
        connect = manager.provisioner.connect
        assert connect["mode"] == "tunnel"
        assert "listened without encryption" in connect["why"]
        assert execute(client, "print(6 * 7)") == "42"
        manager.restart_kernel()
        client.wait_for_ready(timeout=60)
        assert [connection["transport"] for connection in connections(starts)] == ["tcp", "ipc", "ipc"]


def test_looking_at_the_greeting_does_not_disturb_a_direct_kernel(service, kernelspecs):
    """Heartbeat, input and output of a direct kernel work, and its log says nothing of the check."""
    install_kernelspec(kernelspecs, "fine", config_overrides={"connect": "direct"}, spec_overrides=CURVE)
    with running_kernel("fine") as (manager, client):
        assert manager.provisioner.connect["mode"] == "direct"
        assert poll(client.is_alive, timeout=20)
        client.execute("print(input('name? '))", allow_stdin=True)
        assert client.get_stdin_msg(timeout=20)["content"]["prompt"] == "name? "
        client.input("anything")
        output = ""
        deadline = time.monotonic() + 20
        while "anything" not in output and time.monotonic() < deadline:
            output += str(client.get_iopub_msg(timeout=20)["content"].get("text", ""))
        assert client.is_alive()
    # A log without a word is removed.
    logs = Path.home().glob(f".local/state/gateway_slurm/kernel-{manager.kernel_id}.log")
    assert [log.read_text() for log in logs if "rror" in log.read_text()] == []
