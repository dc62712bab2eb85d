#!/usr/bin/python3 -IS
"""Run one of Slurm's commands as the user to which sudo has changed this process. The helper takes no arguments.

The caller writes a request to standard input: four bytes with the length of a JSON header, the header, and the
command's input with its length. The helper trusts nothing in a request. A request names one of COMMANDS with options
and variables from its lists; it cannot choose the user or the directories of programs. The helper prints READY as the
first line on standard output, then the command's output, and ends with the command's exit status (128 + N for signal
N). Without READY it has run nothing, and standard error holds the reason.

Standard input stays open while the command runs. When it is closed, the helper kills the command, unless the command
is detached; any byte on it sends SIGTERM to the command. The caller has no other way to end the command: sudo has
changed the user of this process, so the caller cannot signal it.

The settings are in a file beside this one, with the ending ``.json``: ``path`` (the directories of Slurm's commands,
separated by ``:``), ``slurm_conf``, ``min_uid`` and ``sbatch_options`` (names of further options of sbatch). Both files
and all directories above them must belong to root and be writable by root only; otherwise the helper runs nothing. It
needs Python 3.9 and the standard library only.

Sources: sudoers(5); sbatch(1), srun(1), scancel(1), squeue(1).
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import re
import select
import signal
import struct
import subprocess
import sys
import time
from typing import Any, NamedTuple

READY = b"gateway_slurm as user, 1\n"
LENGTH = struct.Struct("!I")
MAX_HEADER = 256 << 10  # bytes
MAX_INPUT = 4 << 20  # bytes
MAX_TIMEOUT = 3600.0  # seconds
REQUEST_TIMEOUT = 30.0  # seconds
LOWEST_UID = 1000
NOBODY_UID = 65534
REFUSED_STATUS = 100  # the helper's exit status if it ran nothing

# The helper sets the other variables itself: LD_PRELOAD, SLURM_CONF and many more choose the code that runs.
VARIABLES = frozenset({"GATEWAY_SLURM_TOKEN", "LC_ALL", "SLURM_TIME_FORMAT"})


class AllowedCommand(NamedTuple):
    """The arguments that a command may have: options by name, then words that match these patterns in this order."""

    options: str
    words: tuple[str, ...] = ()


# Not allowed, because they would run or read files on this machine: srun's --prolog, sbatch's script as an argument.
COMMANDS = {
    "sbatch": AllowedCommand(
        "parsable no-requeue job-name comment output error export chdir partition account nodes ntasks-per-node "
        "cpus-per-task mem time gres reservation qos constraint nodelist signal propagate"
    ),
    "scancel": AllowedCommand("", (r"[1-9][0-9]{0,9}",)),
    "squeue": AllowedCommand("states noheader jobs Format me partition sort steps"),
    "srun": AllowedCommand(
        "overlap exact immediate jobid nodes ntasks nodelist job-name export chdir mem cpus-per-task gres propagate",
        (r"/bin/sh", r"-s"),
    ),
}


class Refused(Exception):
    """The helper runs nothing; the message is the reason."""


class Settings(NamedTuple):
    """The settings that root has written beside this file."""

    path: str = "/usr/local/bin:/usr/bin:/bin"
    slurm_conf: str = ""
    min_uid: int = LOWEST_UID
    sbatch_options: tuple[str, ...] = ()


class Request(NamedTuple):
    """A checked request."""

    command: str
    arguments: tuple[str, ...]
    environment: dict[str, str]
    timeout: float
    detached: bool
    input: bytes


# -- The installation, its settings and the user --


def check_installation(path: str) -> None:
    """Raise Refused if a user other than root could change or replace the file."""
    while True:
        try:
            status = os.lstat(path)
        except OSError as error:
            raise Refused(f"{path} cannot be examined: {error}") from error
        if status.st_uid != 0 or status.st_mode & 0o022:
            raise Refused(f"others than root can change {path}: it must belong to root and be writable by root only")
        if path == "/":
            return
        path = os.path.dirname(path)


def load_settings(path: str) -> Settings:
    """Return the settings in ``path``, a checked file, or the defaults if there is none. Raises Refused."""
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except FileNotFoundError:
        return Settings()
    except (OSError, ValueError) as error:
        raise Refused(f"{path} cannot be read: {error}") from error
    return parse_settings(found, path)


def parse_settings(found: Any, path: str) -> Settings:
    """Return the settings in the file ``path``. Raises Refused for an unknown name or a wrong value."""
    types = {"path": str, "slurm_conf": str, "min_uid": int, "sbatch_options": list}
    if not isinstance(found, dict) or not found.keys() <= types.keys():
        raise Refused(f"{path} must be an object with no names but {', '.join(types)}")
    for name, value in found.items():
        if not isinstance(value, types[name]):
            raise Refused(f"{path}: {name} has the wrong type")
    settings = Settings(**{**found, "sbatch_options": tuple(map(str, found.get("sbatch_options", ())))})
    if settings.min_uid < LOWEST_UID:
        raise Refused(f"{path}: min_uid must be at least {LOWEST_UID}")
    return settings


def this_user(settings: Settings) -> pwd.struct_passwd:
    """Return the user of this process. Raises Refused for a system account."""
    uid = os.getuid()
    if len({uid, os.geteuid()}) > 1 or os.getgid() != os.getegid():
        raise Refused("real and effective user or group differ")
    if uid < settings.min_uid or uid == NOBODY_UID:
        raise Refused(f"nothing is run for user id {uid}: it is a system account")
    try:
        return pwd.getpwuid(uid)
    except KeyError:
        raise Refused(f"user id {uid} has no name on this machine") from None


# -- The request --


def read_request(descriptor: int) -> tuple[bytes, bytes]:
    """Read header and input, with limits on size and time. Raises Refused."""
    deadline = time.monotonic() + REQUEST_TIMEOUT
    (size,) = LENGTH.unpack(_read(descriptor, LENGTH.size, deadline))
    if size > MAX_HEADER:
        raise Refused(f"the header has {size} bytes; at most {MAX_HEADER} are read")
    header = _read(descriptor, size, deadline)
    (size,) = LENGTH.unpack(_read(descriptor, LENGTH.size, deadline))
    if size > MAX_INPUT:
        raise Refused(f"the input has {size} bytes; at most {MAX_INPUT} are read")
    return header, _read(descriptor, size, deadline)


def _read(descriptor: int, size: int, deadline: float) -> bytes:
    data = b""
    while len(data) < size:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([descriptor], [], [], left)[0]:
            raise Refused(f"the request did not come within {REQUEST_TIMEOUT:g} s")
        part = os.read(descriptor, size - len(data))
        if not part:
            raise Refused("the request is incomplete")
        data += part
    return data


def parse_request(header: bytes, data: bytes, settings: Settings) -> Request:
    """Return the request if all its parts are allowed. Raises Refused."""
    try:
        fields = json.loads(header.decode("utf-8"))
    except (ValueError, RecursionError):
        raise Refused("the header is not JSON") from None
    types = {"command": str, "arguments": list, "environment": dict, "timeout": (int, float), "detached": bool}
    if not isinstance(fields, dict) or fields.keys() != types.keys():
        raise Refused(f"the header must have {', '.join(types)}")
    for name, expected in types.items():
        if not isinstance(fields[name], expected):  # type: ignore[arg-type]
            raise Refused(f"{name} has the wrong type")
    if not 0 < fields["timeout"] <= MAX_TIMEOUT:
        raise Refused(f"timeout must be above 0 and at most {MAX_TIMEOUT:g} s")
    if fields["detached"] and fields["command"] != "srun":
        raise Refused("only srun can be detached")
    check_arguments(fields["command"], fields["arguments"], settings)
    check_environment(fields["environment"])
    return Request(input=data, **{**fields, "arguments": tuple(fields["arguments"])})


def check_arguments(command: str, arguments: list[Any], settings: Settings) -> None:
    """Raise Refused for a command, an option or a word that is not on the lists."""
    if command not in COMMANDS:
        raise Refused(f"{command[:50]!r} is not one of {', '.join(COMMANDS)}")
    options, patterns = COMMANDS[command]
    allowed = {*options.split(), *(settings.sbatch_options if command == "sbatch" else ())}
    if any(not isinstance(item, str) or "\0" in item for item in arguments):
        raise Refused("arguments must be texts without NUL")
    words = [item for item in arguments if not item.startswith("--")]
    if arguments[len(arguments) - len(words) :] != words:
        raise Refused("options must come first")
    for item in arguments[: len(arguments) - len(words)]:
        name, _, value = item[2:].partition("=")
        if name not in allowed or (name == "export" and value != "ALL"):
            raise Refused(f"{command} may not be run with {item[:100]!r}")
    matches = [re.fullmatch(pattern, word, re.ASCII) for pattern, word in zip(patterns, words)]
    if len(words) != len(patterns) or not all(matches):
        raise Refused(f"{command} may not be run with {words!r:.100}")


def check_environment(environment: dict[str, Any]) -> None:
    """Raise Refused for a variable that is not on the list."""
    for name, value in environment.items():
        if name not in VARIABLES or not isinstance(value, str) or "\0" in value:
            raise Refused(f"the variable {name[:50]!r} is not allowed")


# -- Running the command --


def find_program(command: str, path: str) -> str:
    """Return the command's program in one of the directories in ``path``. Raises Refused."""
    for directory in path.split(":"):
        candidate = os.path.join(directory, command)
        if os.path.isabs(candidate) and os.access(candidate, os.X_OK):
            return candidate
    raise Refused(f"{command} is not in {path}: name its directory in the helper's settings (path)")


def environment_of(user: pwd.struct_passwd, request: Request, settings: Settings) -> dict[str, str]:
    """Return the command's whole environment."""
    fixed = {"PATH": settings.path, "HOME": user.pw_dir, "USER": user.pw_name, "LOGNAME": user.pw_name}
    if user.pw_shell:
        fixed["SHELL"] = user.pw_shell
    if settings.slurm_conf:
        fixed["SLURM_CONF"] = settings.slurm_conf
    return {**request.environment, **fixed}


def run(program: str, request: Request, environment: dict[str, str]) -> int:
    """Run the command to its end and return the exit status."""
    wakeup, write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    # A file, since a pipe would need a writer while the helper waits for the command.
    stdin = os.memfd_create("input")
    with open(stdin, "wb", closefd=False) as file:
        file.write(request.input)
    os.lseek(stdin, 0, os.SEEK_SET)
    write_all(1, READY)
    if request.detached:
        # The reader of standard output may end long before the step.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    # As UTF-8: the user's locale may have no character for a job's name.
    arguments = [item.encode("utf-8", "surrogateescape") for item in request.arguments]
    child = subprocess.Popen(
        [program, *arguments], executable=program, stdin=stdin, env=environment, start_new_session=True
    )
    os.close(stdin)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _frame: end(child, number))
    status = watch(child, wakeup, request)
    return status if status >= 0 else 128 - status


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of ``data``."""
    while data:
        data = data[os.write(descriptor, data) :]


def watch(child: subprocess.Popen[bytes], wakeup: int, request: Request) -> int:
    """Wait for the command's end. End the command at its timeout, or as standard input says (see the module)."""
    deadline = None if request.detached else time.monotonic() + request.timeout
    poller = select.poll()
    poller.register(0, select.POLLIN)
    poller.register(wakeup, select.POLLIN)
    while child.poll() is None:
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            end(child, signal.SIGKILL)
            return child.wait()
        ready = [descriptor for descriptor, _events in poller.poll(None if left is None else left * 1000 + 1)]
        if wakeup in ready:
            os.read(wakeup, 4096)
        if 0 in ready:
            if os.read(0, 4096):
                end(child, signal.SIGTERM)
            else:
                poller.unregister(0)
                if not request.detached:
                    end(child, signal.SIGKILL)
    return child.wait()


def end(child: subprocess.Popen[bytes], number: int) -> None:
    """Signal the command's process group; does nothing after the command has ended."""
    if child.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)


def main() -> int:
    """Run the request on standard input after all checks; return the exit status."""
    try:
        if len(sys.argv) > 1:
            raise Refused("it takes no arguments")
        program_path = os.path.realpath(__file__)
        check_installation(program_path)
        settings_path = os.path.splitext(program_path)[0] + ".json"
        if os.path.lexists(settings_path):
            check_installation(settings_path)
        settings = load_settings(settings_path)
        user = this_user(settings)
        request = parse_request(*read_request(0), settings)
        program = find_program(request.command, settings.path)
    except Refused as refusal:
        write_all(2, f"gateway_slurm's helper: {refusal}\n".encode(errors="replace"))
        return REFUSED_STATUS
    os.chdir("/")
    with contextlib.suppress(OSError):
        os.chdir(user.pw_dir)
    return run(program, request, environment_of(user, request, settings))


if __name__ == "__main__":
    sys.exit(main())
