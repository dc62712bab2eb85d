#!/usr/bin/python3 -IS
"""Run one of Slurm's commands as the user that sudo has made this process; it takes no arguments.

What to run is told on standard input: four bytes with the length of a JSON header, the header, and what
the command is to read. Nothing of that is trusted: a request names one of COMMANDS, and options and
variables from its lists, and says no word on who runs it or where programs are. The first line on
standard output is READY; then comes what the command prints, and its exit status is ours (128 + N for
signal N). Without READY nothing was run, and standard error says why.

Standard input stays open while the command runs. When it ends the command is killed, unless it is a
detached one; any byte on it ends the command in an orderly way. Whoever made this process cannot signal
it, since sudo has changed its user: so this is the way to end it.

Settings are in a file beside this one, of the same name but for its ending, ``.json``:
``path`` (directories of Slurm's commands, with ``:``), ``slurm_conf``, ``min_uid`` and ``sbatch_options``
(names of further options of sbatch's). This file, that one, and all directories above belong to root and can
be written by nobody else, or nothing is run. Needs Python 3.9, and the standard library only.

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
REQUEST_SECONDS = 30.0
LOWEST_UID = 1000
NOBODY = 65534
REFUSED = 100  # our exit status when nothing was run

# Everything else in the environment is ours to set, or stays away: LD_PRELOAD, SLURM_CONF and many more
# choose what code runs.
VARIABLES = frozenset({"GATEWAY_SLURM_TOKEN", "LC_ALL", "SLURM_TIME_FORMAT"})


class Command(NamedTuple):
    """What one command may be given: options by name, then words that match these patterns, in this order."""

    options: frozenset[str]
    words: tuple[str, ...] = ()


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# srun's --prolog, and sbatch's script as an argument, would run or read files on this machine.
COMMANDS = {
    "sbatch": Command(
        _names(
            "parsable no-requeue job-name comment output error export chdir partition account nodes ntasks-per-node "
            "cpus-per-task mem time gres reservation qos constraint nodelist signal"
        )
    ),
    "scancel": Command(_names(""), (r"[0-9]{1,10}",)),
    "squeue": Command(_names("states noheader jobs Format me name partition sort steps")),
    "srun": Command(
        _names("overlap exact immediate jobid nodes ntasks nodelist job-name export chdir mem cpus-per-task gres"),
        (r"/bin/sh", r"-s"),
    ),
}


class Refused(Exception):
    """Nothing is run; the message says why."""


class Settings(NamedTuple):
    """What root has written beside this file."""

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


# -- who we are, and where we stand ---------------------------------------------------------------------


def check_installation(path: str) -> None:
    """Refuse when anybody but root could change the file, or put another in its place."""
    while True:
        try:
            facts = os.lstat(path)
        except OSError as error:
            raise Refused(f"{path} cannot be looked at: {error}") from error
        if facts.st_uid != 0 or facts.st_mode & 0o022:
            raise Refused(f"others than root can change {path}: it must belong to root and be writable by root only")
        if path == "/":
            return
        path = os.path.dirname(path)


def load_settings(path: str) -> Settings:
    """The settings in ``path``, a file that has been checked; the defaults where there is none."""
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except FileNotFoundError:
        return Settings()
    except (OSError, ValueError) as error:
        raise Refused(f"{path} cannot be read: {error}") from error
    return parse_settings(found, path)


def parse_settings(found: Any, path: str) -> Settings:
    """The settings that ``path`` holds; a mistake there is told, and not overlooked."""
    kinds = {"path": str, "slurm_conf": str, "min_uid": int, "sbatch_options": list}
    if not isinstance(found, dict) or not found.keys() <= kinds.keys():
        raise Refused(f"{path} must be an object with nothing but {', '.join(kinds)}")
    for name, value in found.items():
        if not isinstance(value, kinds[name]):
            raise Refused(f"{path}: {name} is of a wrong type")
    settings = Settings(**{**found, "sbatch_options": tuple(map(str, found.get("sbatch_options", ())))})
    if settings.min_uid < LOWEST_UID:
        raise Refused(f"{path}: min_uid is at least {LOWEST_UID}")
    return settings


def this_user(settings: Settings) -> pwd.struct_passwd:
    """The user that we are, unless it is one for whom nothing is run."""
    uid = os.getuid()
    if len({uid, os.geteuid()}) > 1 or os.getgid() != os.getegid():
        raise Refused("real and effective user or group differ")
    if uid < settings.min_uid or uid == NOBODY:
        raise Refused(f"nothing is run for user id {uid}: it is a system account's")
    try:
        return pwd.getpwuid(uid)
    except KeyError:
        raise Refused(f"user id {uid} has no name here") from None


# -- the request --------------------------------------------------------------------------------------


def read_request(descriptor: int) -> tuple[bytes, bytes]:
    """Header and input, as they came; bounded in size and time."""
    deadline = time.monotonic() + REQUEST_SECONDS
    (size,) = LENGTH.unpack(_read(descriptor, LENGTH.size, deadline))
    if size > MAX_HEADER:
        raise Refused(f"a header of {size} bytes; at most {MAX_HEADER} are read")
    header = _read(descriptor, size, deadline)
    (size,) = LENGTH.unpack(_read(descriptor, LENGTH.size, deadline))
    if size > MAX_INPUT:
        raise Refused(f"an input of {size} bytes; at most {MAX_INPUT} are read")
    return header, _read(descriptor, size, deadline)


def _read(descriptor: int, size: int, deadline: float) -> bytes:
    data = b""
    while len(data) < size:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([descriptor], [], [], left)[0]:
            raise Refused(f"the request did not come within {REQUEST_SECONDS:g} s")
        part = os.read(descriptor, size - len(data))
        if not part:
            raise Refused("the request ended too soon")
        data += part
    return data


def parse_request(header: bytes, data: bytes, settings: Settings) -> Request:
    """The request, if each part of it is one that is run."""
    try:
        told = json.loads(header.decode("utf-8"))
    except (ValueError, RecursionError):
        raise Refused("the header is not JSON") from None
    kinds = {"command": str, "arguments": list, "environment": dict, "timeout": (int, float), "detached": bool}
    if not isinstance(told, dict) or told.keys() != kinds.keys():
        raise Refused(f"the header must have {', '.join(kinds)}")
    for name, kind in kinds.items():
        if not isinstance(told[name], kind):  # type: ignore[arg-type]
            raise Refused(f"{name} is of a wrong type")
    if not 0 < told["timeout"] <= MAX_TIMEOUT:
        raise Refused(f"timeout must be above 0 and at most {MAX_TIMEOUT:g} s")
    if told["detached"] and told["command"] != "srun":
        raise Refused("only srun is detached")
    check_arguments(told["command"], told["arguments"], settings)
    check_environment(told["environment"])
    return Request(input=data, **{**told, "arguments": tuple(told["arguments"])})


def check_arguments(command: str, arguments: list[Any], settings: Settings) -> None:
    """Refuse a command, an option or a word that is on no list."""
    if command not in COMMANDS:
        raise Refused(f"{command[:50]!r} is not one of {', '.join(COMMANDS)}")
    allowed, patterns = COMMANDS[command]
    if command == "sbatch":
        allowed |= frozenset(settings.sbatch_options)
    if any(not isinstance(item, str) or "\0" in item for item in arguments):
        raise Refused("arguments are texts without NUL")
    words = [item for item in arguments if not item.startswith("--")]
    if arguments[len(arguments) - len(words) :] != words:
        raise Refused("options come first")
    for item in arguments[: len(arguments) - len(words)]:
        name, _, value = item[2:].partition("=")
        if name not in allowed or (name == "export" and value != "ALL"):
            raise Refused(f"{command} is not run with {item[:100]!r}")
    if len(words) != len(patterns) or not all(map(_matches, patterns, words)):
        raise Refused(f"{command} is not run with {words!r:.100}")


def _matches(pattern: str, word: str) -> bool:
    return re.fullmatch(pattern, word, re.ASCII) is not None


def check_environment(environment: dict[str, Any]) -> None:
    """Refuse variables that are on no list."""
    for name, value in environment.items():
        if name not in VARIABLES or not isinstance(value, str) or "\0" in value:
            raise Refused(f"the variable {name[:50]!r} is not taken")


# -- running it ----------------------------------------------------------------------------------------


def find_program(command: str, path: str) -> str:
    """The command's path, from our own list of directories."""
    for directory in path.split(":"):
        candidate = os.path.join(directory, command)
        if os.path.isabs(candidate) and os.access(candidate, os.X_OK):
            return candidate
    raise Refused(f"{command} is not in {path}: name its directory in the helper's settings (path)")


def environment_of(user: pwd.struct_passwd, request: Request, settings: Settings) -> dict[str, str]:
    """The command's whole environment."""
    own = {"PATH": settings.path, "HOME": user.pw_dir, "USER": user.pw_name, "LOGNAME": user.pw_name}
    if user.pw_shell:
        own["SHELL"] = user.pw_shell
    if settings.slurm_conf:
        own["SLURM_CONF"] = settings.slurm_conf
    return {**request.environment, **own}


def enter_home(user: pwd.struct_passwd) -> None:
    """Work in the user's home directory, or in / where that cannot be entered."""
    try:
        os.chdir(user.pw_dir)
    except OSError:
        os.chdir("/")


def run(program: str, request: Request, environment: dict[str, str]) -> int:
    """Run the command and see to its end; return the exit status."""
    alarm, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    # A file and not a pipe: nobody has to write it while we look after the command.
    stdin = os.memfd_create("input")
    with open(stdin, "wb", closefd=False) as file:
        file.write(request.input)
    os.lseek(stdin, 0, os.SEEK_SET)
    write_all(1, READY)
    if request.detached:
        # Whoever reads what we print may be gone long before the step.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    child = subprocess.Popen(
        [program, *request.arguments], executable=program, stdin=stdin, env=environment, start_new_session=True
    )
    os.close(stdin)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _frame: end(child, number))
    status = watch(child, alarm, request)
    return status if status >= 0 else 128 - status


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of it."""
    while data:
        data = data[os.write(descriptor, data) :]


def watch(child: subprocess.Popen[bytes], alarm: int, request: Request) -> int:
    """Wait for the command's end, and bring it about when nobody wants it any more or its time is up."""
    deadline = None if request.detached else time.monotonic() + request.timeout
    poller = select.poll()
    poller.register(0, select.POLLIN)
    poller.register(alarm, select.POLLIN)
    while child.poll() is None:
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            end(child, signal.SIGKILL)
            return child.wait()
        ready = [descriptor for descriptor, _events in poller.poll(None if left is None else left * 1000 + 1)]
        if alarm in ready:
            os.read(alarm, 4096)
        if 0 in ready:
            told = os.read(0, 4096)
            if told:
                end(child, signal.SIGTERM)
            else:
                poller.unregister(0)
                if not request.detached:
                    end(child, signal.SIGKILL)
    return child.wait()


def end(child: subprocess.Popen[bytes], number: int) -> None:
    """Signal the command's process group; nothing happens once the command has ended."""
    if child.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)


def main() -> int:
    """Run what standard input asks for; nothing unless all is as it should be."""
    try:
        if len(sys.argv) > 1:
            raise Refused("there are no arguments to give")
        here = os.path.realpath(__file__)
        check_installation(here)
        beside = os.path.splitext(here)[0] + ".json"
        if os.path.lexists(beside):
            check_installation(beside)
        settings = load_settings(beside)
        user = this_user(settings)
        request = parse_request(*read_request(0), settings)
        program = find_program(request.command, settings.path)
    except Refused as refusal:
        write_all(2, f"gateway_slurm's helper: {refusal}\n".encode(errors="replace"))
        return REFUSED
    enter_home(user)
    return run(program, request, environment_of(user, request, settings))


if __name__ == "__main__":
    sys.exit(main())
