"""Run the tests against a Slurm that this machine does not have, in a Debian root file system that does.

``slurm_rootfs.py VERSION [pytest's arguments]``, as root; ``make test-slurm-VERSION`` calls it. The root file system is
made once, in ``.slurm/VERSION``, by debootstrap, from the archive that this machine's own apt uses, its signatures
checked. Inside, what is tested is set up as everywhere, by ``make setup``, with that Debian's Slurm and Python.

A run has mounts and processes of its own (in_rootfs.sh), and both end with this program, however that ends.
Sources: debootstrap(8), unshare(1), setpriv(1), apt-get(8).
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import inspect
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

# Which suite of Debian has which Slurm. sid moves on: what it has is checked in each run.
SUITES = {"22.05": "bookworm", "24.11": "trixie", "26.05": "sid"}

PROJECT = Path(__file__).resolve().parent.parent
ROOTS = PROJECT / ".slurm"
# make setup, inside, brings all else.
PACKAGES = ("ca-certificates", "make", "python3", "python3-venv")
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
# What the copy of the work tree goes without.
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", ".slurm", "__pycache__", ".*_cache", ".hypothesis", "*.egg-info")

# How this machine resolves names, and whom it trusts: shown inside, copied nowhere.
SHOWN = ("/etc/resolv.conf", "/etc/hosts", "/etc/pip.conf", "/etc/ssl/certs/ca-certificates.crt")
# What of the environment is passed on: how the registries are reached, and what tests are told.
PASSED = ("CI", "TERM", "TZ", "PYTEST_ADDOPTS", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
PASSED_PREFIXES = ("PIP_", "SSL_", "CHAOS_", "http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY")

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# Inside: sh -c TESTS VERSION SUITE [pytest's arguments]
TESTS = """
make --no-print-directory setup </dev/null || exit
case "$(slurmctld -V)" in
  *" $0".*) ;;
  *)
    echo "slurm_rootfs: Debian's $1 has $(slurmctld -V) now, not $0: see SUITES in scripts/slurm_rootfs.py" >&2
    exit 3
    ;;
esac
shift
exec .venv/bin/python -m pytest "$@"
"""


def main() -> int:
    """Make the root file system if need be, and run in it; the tests' exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version", choices=SUITES, help="Slurm's")
    parser.add_argument("--run", action="store_true", help="the arguments are a command, instead of pytest's")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    if os.geteuid() != 0:
        die("mounts need root: sudo make test-slurm-" + options.version)
    end_with_signals()
    suite = SUITES[options.version]
    root = ROOTS / options.version
    with alone(root):
        mirror = archive()
        build(root, suite, mirror)
        copy_project(root / "project")
        command = options.arguments if options.run else ["sh", "-c", TESTS, options.version, suite, *options.arguments]
        # Signatures are checked. A mirror may be more behind than sid allows, which tests can live with.
        return in_root(root, command, apt_line=f"deb [check-valid-until=no] {mirror} {suite} main")


def end_with_signals() -> None:
    """SIGTERM and SIGHUP end this program as Ctrl-C does: what is open is closed on the way out."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _frame: sys.exit(128 + number))


def die(complaint: str) -> NoReturn:
    """End with what is wrong and what to do."""
    sys.exit(f"slurm_rootfs: {complaint}")


def say(text: str) -> None:
    """One line about what happens next."""
    print(f"==> {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def alone(root: Path) -> Iterator[None]:
    """One run at a time in one root: the next one replaces the work tree under its feet."""
    root.parent.mkdir(exist_ok=True)
    with root.with_name(f"{root.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"Another run is in {root}; waiting for its end")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def archive() -> str:
    """The address of the archive that this machine's release comes from, as apt itself reads its sources."""
    with open("/etc/os-release", encoding="utf-8") as file:
        release = dict(line.strip().split("=", 1) for line in file if "=" in line)
    codename = shlex.split(release.get("VERSION_CODENAME", ""))
    targets = apt_targets()
    if not targets:
        # apt tells of those only whose lists are there, and a new machine may have none.
        call(["apt-get", "update", "-qq"])
        targets = apt_targets()
    for line in targets:
        uri, suite, component = line.split()
        if component == "main" and suite in (*codename, *SUITES.values()):
            return uri
    die(f"no apt source of this machine has {' '.join(codename) or 'its release'} main; see /etc/apt/sources.list.d")


def apt_targets() -> list[str]:
    """Each list of packages that apt has: the archive's address, the suite, the component."""
    argv = ["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)", "Created-By: Packages"]
    try:
        return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=60).stdout.splitlines()
    except (OSError, subprocess.SubprocessError) as error:
        die(f"apt does not tell its sources: {error}. This needs a Debian machine.")


def build(root: Path, suite: str, mirror: str) -> None:
    """debootstrap into ``root``, unless it is there and was made by these very lines."""
    wanted = hashlib.sha256(f"{suite} {PACKAGES} {inspect.getsource(build)}".encode()).hexdigest()
    stamp = root / ".made-by"
    if stamp.exists() and stamp.read_text(encoding="ascii") == wanted:
        return
    if shutil.which("debootstrap") is None:
        say("apt-get install debootstrap")
        call(["apt-get", "update", "-qq"])
        call(["apt-get", "install", "-y", "-qq", "--no-install-recommends", "debootstrap", "debian-archive-keyring"])
    shutil.rmtree(root, ignore_errors=True)
    say(f"debootstrap {suite} in {root}")
    options = ["--variant=minbase", f"--keyring={KEYRING}", f"--include={','.join(PACKAGES)}"]
    # Without --force-check-gpg a missing keyring would be a warning only.
    call([*namespaces(), "debootstrap", "--force-check-gpg", *options, suite, str(root), mirror])
    # The archive's address is this machine's matter: a run tells it apt anew.
    (root / "etc/apt/sources.list").unlink(missing_ok=True)
    (root / "etc/dpkg/dpkg.cfg.d/unsafe-io").write_text("force-unsafe-io\n", encoding="ascii")
    # Nothing is to be started by an installation.
    policy = root / "usr/sbin/policy-rc.d"
    policy.write_text("#!/bin/sh\nexit 101\n", encoding="ascii")
    policy.chmod(0o755)
    stamp.write_text(wanted, encoding="ascii")


def copy_project(target: Path) -> None:
    """The work tree as it is, committed or not; the venv inside stays from one run to the next."""
    target.mkdir(exist_ok=True)
    for path in target.iterdir():
        if path.name == ".venv":
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    # With the files' times: make sees whether what is to be installed has changed.
    shutil.copytree(PROJECT, target, symlinks=True, ignore=LEFT_OUT, dirs_exist_ok=True)


def in_root(root: Path, command: Sequence[str], *, apt_line: str) -> int:
    """Run the command in the copy of the work tree, with mounts and processes that end with it."""
    environment = {
        name: value for name, value in os.environ.items() if name in PASSED or name.startswith(PASSED_PREFIXES)
    }
    environment |= {"HOME": "/root", "LANG": "C.UTF-8", "PATH": PATH}
    environment |= {"APT_LINE": apt_line, "SHOWN": " ".join([*SHOWN, *pip_paths()])}
    inside = [*namespaces(), "bash", str(PROJECT / "scripts/in_rootfs.sh"), str(root), *command]
    return call(inside, environment=environment, check=False)


def namespaces() -> list[str]:
    """What gives a command its own mounts and process ids; all of them end when its parent, this program, does."""
    own = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"]
    return ["setpriv", "--pdeathsig", "KILL", *own]


def call(argv: Sequence[str], *, environment: dict[str, str] | None = None, check: bool = True) -> int:
    """Run a command to its end; if this program is to end before, so does the command."""
    process = subprocess.Popen(argv, env=environment)
    try:
        status = process.wait()
    except KeyboardInterrupt:
        # A terminal tells them, too: pytest ends its daemons in order.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=60)
        raise
    finally:
        process.kill()
        process.wait()
    if check and status:
        die(f"{argv[0] if argv[0] != 'setpriv' else 'debootstrap'} ended with status {status}; see above")
    return status


def pip_paths() -> list[str]:
    """Files and directories of this machine that its pip is told of: certificates, constraints, wheels."""
    argv = [sys.executable, "-m", "pip", "config", "list"]
    result = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=60)
    words = [word.strip("'\"") for line in result.stdout.splitlines() for word in line.partition("=")[2].split()]
    paths = [urlsplit(word).path for word in words if word.startswith(("/", "file:///"))]
    # What an index lists may lie beside it.
    return [path for path in paths if os.path.exists(path) and path not in SHOWN]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
