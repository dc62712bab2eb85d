"""Runs a program whose file locks fail, as on NFS without lockd (ENOLCK) or Lustre without ``flock`` (ENOSYS).

Run as ``python no_locks.py ERRNO PROGRAM ARGUMENTS…``. The kernel refuses the locks by a seccomp(2) filter, for
flock(2) and for the locking commands of fcntl(2); everything else works. It needs no root.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import struct
import sys

# linux/filter.h, linux/seccomp.h, linux/prctl.h, linux/audit.h
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _FILTER = 22, 38, 2
_NUMBERS = {"x86_64": {"fcntl": 72, "flock": 73}, "aarch64": {"fcntl": 25, "flock": 32}}
_NUMBER_AT, _COMMAND_AT = 0, 24  # struct seccomp_data: the call, and the low half of its second argument
_COMMANDS = (fcntl.F_SETLK, fcntl.F_SETLKW, fcntl.F_OFD_SETLK, fcntl.F_OFD_SETLKW)


def refuse_locks(number: int) -> None:
    """From now on every lock that this process and its children take fails with this errno."""
    calls = _NUMBERS[platform.machine()]
    checks = [(_LOAD, 0, 0, _NUMBER_AT), (_EQUAL, len(_COMMANDS) + 3, 0, calls["flock"])]
    checks += [(_EQUAL, 0, len(_COMMANDS) + 1, calls["fcntl"]), (_LOAD, 0, 0, _COMMAND_AT)]
    checks += [(_EQUAL, len(_COMMANDS) - at, 0, command) for at, command in enumerate(_COMMANDS)]
    checks += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _ERRNO | number)]
    program = b"".join(struct.pack("=HBBI", *check) for check in checks)
    text = ctypes.create_string_buffer(program)
    header = struct.pack("HxxxxxxP", len(checks), ctypes.addressof(text))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(_PR_SET_SECCOMP, _FILTER, header, 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")


if __name__ == "__main__":
    refuse_locks(getattr(errno, sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])  # noqa: S606
