"""A plain Jupyter server: a warning is a line on the standard error of ipykernel, under the cell that runs."""

from __future__ import annotations

import asyncio
import re
import sys
import time
from contextlib import contextmanager
from queue import Empty

import pytest
from jupyter_client import BlockingKernelClient

from helpers.kernel_clients import READY, execute, install_kernelspec, process_of, running_kernel
from helpers.private_slurm import poll

TEXT = "gateway_slurm: job 12 reaches its time limit in 10 minutes, at 14:30: save your work"
# It prints, is busy without printing while the file is not there, and prints again.
BUSY = """
import os, time
for number in range(200): print('before', number)
while not os.path.exists({path!r}): time.sleep(0.02)
for number in range(200): print('after', number)
"""
FLOOD = """
import os
number = 0
while not os.path.exists({path!r}) or number % 5000:
    print(number, 'x' * 200)
    number += 1
"""


@contextmanager
def kernel_of(name):
    """A kernel as ``running_kernel`` gives it, which need not know that it is tested.

    ipykernel captures its standard error, as it does for users, where pytest's variable is not set.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTEST_CURRENT_TEST")
        with running_kernel(name) as (manager, client):
            yield manager, client


def warn(manager, text=TEXT):
    """Warn the kernel, on the service's loop, as a notice of its launcher's does."""

    async def on_loop():
        process_of(manager).warn(text)

    service = manager.provisioner.service
    asyncio.run(service.run(on_loop()))


def another_client(manager):
    """One more client of the kernel, with a session of its own; subscribed soon."""
    client = BlockingKernelClient(connection_file=manager.connection_file)
    client.load_connection_file()
    client.start_channels()
    return client


def hears(client):
    """Whether the client's subscription has reached the kernel, which answers on control while it is busy."""
    client.control_channel.send(client.session.msg("kernel_info_request"))
    try:
        client.get_iopub_msg(timeout=0.2)
    except Empty:
        return False
    return True


def streams_until(client, done, *, timeout=READY):
    """iopub's messages until ``done(message)``, the last one included."""
    found = []
    deadline = time.monotonic() + timeout
    while not found or not done(found[-1]):
        try:
            found.append(client.get_iopub_msg(timeout=max(0.01, deadline - time.monotonic())))
        except Empty:
            pytest.fail(f"not seen within {timeout} s; seen: {[(m['msg_type'], m['content']) for m in found[-5:]]}")
    return found


def is_line(message):
    """Whether it is a stream message on stderr that holds the warning."""
    content = message["content"]
    return message["msg_type"] == "stream" and content["name"] == "stderr" and TEXT in content["text"]


def printed(message):
    """Whether it is what the cell printed."""
    return message["msg_type"] == "stream" and message["content"]["name"] == "stdout"


def idle_after(msg_id):
    """Whether a message says that the kernel is done with this request."""
    return lambda message: (
        message["msg_type"] == "status"
        and message["content"]["execution_state"] == "idle"
        and message["parent_header"].get("msg_id") == msg_id
    )


def text_of(messages):
    """All that the cell printed."""
    return "".join(message["content"]["text"] for message in messages if printed(message))


def test_a_busy_cell_shows_the_line_and_loses_nothing(service, kernel_name, tmp_path):
    """Every client sees it once on stderr, with the running cell as parent, before the cell ends."""
    with kernel_of(kernel_name) as (manager, client):
        others = [another_client(manager) for _ in range(2)]
        for other in others:
            other.wait_for_ready(timeout=READY)
        path = tmp_path / "go"
        msg_id = client.execute(BUSY.format(path=str(path)))
        clients = [client, *others]
        seen = [
            streams_until(each, lambda m: printed(m) and "before 199\n" in m["content"]["text"]) for each in clients
        ]
        # A client that connects while the cell runs sees it there, too.
        late = another_client(manager)
        assert poll(lambda: hears(late), timeout=READY)
        warn(manager)
        for each, messages in zip([*clients, late], [*seen, []], strict=True):
            messages += streams_until(each, is_line)
            assert messages[-1]["parent_header"]["msg_id"] == msg_id
        path.touch()
        for each, messages in zip(clients, seen, strict=True):
            messages += streams_until(each, idle_after(msg_id))
            assert sum(map(is_line, messages)) == 1
            expected = [f"{when} {number}\n" for when in ("before", "after") for number in range(200)]
            assert text_of(messages) == "".join(expected)
        for each in (*others, late):
            each.stop_channels()
        assert execute(client, "print(In[-2:] == ['', 'print(In[-2:])'] or len(In))") == "3"  # no history of it


def test_under_a_flood_the_line_comes_and_the_output_is_whole(service, kernel_name, tmp_path):
    """While a cell prints as fast as it can, the lines come, between its messages."""
    with kernel_of(kernel_name) as (manager, client):
        path = tmp_path / "stop"
        msg_id = client.execute(FLOOD.format(path=str(path)))
        messages = streams_until(client, printed)
        for _ in range(5):
            warn(manager)
            messages += streams_until(client, is_line)
            assert messages[-1]["parent_header"]["msg_id"] == msg_id
        path.touch()
        messages += streams_until(client, idle_after(msg_id))
        assert sum(message["content"]["text"].count(TEXT) for message in messages if is_line(message)) == 5
        lines = text_of(messages).splitlines()
        assert lines == [f"{number} {'x' * 200}" for number in range(len(lines))]
        assert len(lines) % 5000 == 0
        assert lines


def test_an_idle_kernel_shows_it_under_its_last_cell(service, kernel_name):
    """Frontends keep a cell's output open after its end; the kernel works on as before."""
    with kernel_of(kernel_name) as (manager, client):
        execute(client, "x = 1")
        msg_id = client.execute("print(x)")
        streams_until(client, idle_after(msg_id))
        warn(manager)
        assert streams_until(client, is_line)[-1]["parent_header"]["msg_id"] == msg_id
        assert execute(client, "print(x + 1, len(In))") == "2 4"


def test_after_a_restart_it_is_shown_again(service, kernel_name):
    """The kernel's new process has new connections, and a client that stayed sees the line."""
    with kernel_of(kernel_name) as (manager, client):
        execute(client, "1")
        manager.restart_kernel()
        client.wait_for_ready(timeout=READY)
        msg_id = client.execute("2")
        streams_until(client, idle_after(msg_id))
        warn(manager)
        assert streams_until(client, is_line)[-1]["parent_header"]["msg_id"] == msg_id


def test_a_server_that_shows_warnings_itself_writes_none_to_the_kernel(service, kernel_name, tmp_path, caplog):
    """The gateway gets the text, the log has it, and the cell prints only what it prints."""
    shown = []
    with kernel_of(kernel_name) as (manager, client):
        manager.provisioner.show_warnings(shown.append)
        path = tmp_path / "go"
        msg_id = client.execute(BUSY.format(path=str(path)))
        messages = streams_until(client, printed)
        warn(manager)
        assert poll(lambda: shown == [f"\n{TEXT}\n"], timeout=10)
        assert TEXT in caplog.text
        path.touch()
        messages += streams_until(client, idle_after(msg_id))
        assert not any(map(is_line, messages))
        warn_of_dead = process_of(manager).warn
    asyncio.run(service.run(later(warn_of_dead, TEXT)))  # a kernel that has ended: nothing is raised


async def later(function, *arguments):
    """A plain call on the service's loop."""
    function(*arguments)


def install_for(kernelspecs, mode, name, argv):
    """A kernelspec with this command, whose clients go by ``mode``."""
    install_kernelspec(
        kernelspecs,
        name,
        config_overrides={"kernel_argv": argv, "connect": mode},
        spec_overrides={"metadata": {"supported_encryption": ["curve"]}},
    )


def test_for_a_kernel_that_captures_nothing_the_log_says_so(service, kernelspecs, mode, caplog):
    """The line is not written where it would not be shown."""
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--IPKernelApp.capture_fd_output=0"]
    install_for(kernelspecs, mode, "uncaptured", argv)
    with kernel_of("uncaptured") as (manager, client):
        warn(manager)
        assert poll(lambda: "does not capture its standard error" in caplog.text, timeout=10)
        assert execute(client, "print(1)") == "1"


def test_a_wrapped_kernel_is_found_behind_its_wrapper(service, kernelspecs, mode):
    """A kernel that a script started, with another process beside it whose stderr is a pipe."""
    script = f"sleep 300 2> >(cat) & {sys.executable} -m ipykernel_launcher -f $0; true"
    install_for(kernelspecs, mode, "wrapped", ["bash", "-c", script, "{connection_file}"])
    with kernel_of("wrapped") as (manager, client):
        start = "import subprocess; child = subprocess.Popen(['sleep', '300'], stderr=subprocess.PIPE)"
        execute(client, start)
        msg_id = client.execute("import time; time.sleep(1)")
        streams_until(client, lambda message: message["msg_type"] == "execute_input")
        warn(manager)
        messages = streams_until(client, idle_after(msg_id))
        assert [message["parent_header"]["msg_id"] for message in messages if is_line(message)] == [msg_id]


def test_a_walltime_notice_is_such_a_warning(admin_settings, kernel_name):
    """It says which job, the time that is left, and the hour of the end."""
    with kernel_of(kernel_name) as (manager, client):
        process = process_of(manager)
        launcher = process.launcher
        msg_id = client.execute("import time; time.sleep(2)")
        streams_until(client, lambda message: message["msg_type"] == "execute_input")
        end_time = time.time() + 600
        asyncio.run(manager.provisioner.service.run(later(launcher.warn_of_end, end_time)))
        line = streams_until(client, lambda m: m["msg_type"] == "stream" and m["content"]["name"] == "stderr")[-1]
        expected = (
            rf"gateway_slurm: job {launcher.jobid} reaches its time limit in 10 minutes, "
            r"at \d\d:\d\d \S+: save your work"
        )
        assert re.search(expected, line["content"]["text"])
        assert line["parent_header"]["msg_id"] == msg_id
        assert process.walltime_end == end_time
