"""Run the tests with another version of Slurm, in a root file system of the Debian release that has it.

``slurm_rootfs.py VERSION [pytest's arguments]``, as root; ``make test-slurm-VERSION`` calls it. debootstrap makes the
root file system once, in ``.slurm/VERSION``, from the archive that this machine's apt uses, and checks signatures.
Inside it ``make setup`` sets up the tests as everywhere, with that Debian's Slurm and Python.

A run has its own mounts and processes (in_rootfs.sh). Both end with this program, however it ends.
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

# The Debian suite of each Slurm version. sid changes, so each run checks its version.
SUITES = {"22.05": "bookworm", "24.11": "trixie", "26.05": "sid"}

PROJECT = Path(__file__).resolve().parent.parent
ROOTS = PROJECT / ".slurm"
# make setup installs everything else.
PACKAGES = ("ca-certificates", "make", "python3", "python3-venv")
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
# The copy of the work tree omits these.
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", ".slurm", "__pycache__", ".*_cache", ".hypothesis", "*.egg-info")

# This machine's name resolution and certificates, which are mounted inside and not copied.
MOUNTED = ("/etc/resolv.conf", "/etc/hosts", "/etc/pip.conf", "/etc/ssl/certs/ca-certificates.crt")
# Environment variables that are passed on: for access to registries, and for the tests.
PASSED = ("CI", "TERM", "TZ", "PYTEST_ADDOPTS", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
PASSED_PREFIXES = ("PIP_", "SSL_", "CHAOS_", "http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY")

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# Inside: sh -c TESTS VERSION SUITE [pytest's arguments]
TESTS = """
make --no-print-directory setup </dev/null || exit
case "$(slurmctld -V)" in
  *" $0".*) ;;
  *)
    echo "slurm_rootfs: Debian's $1 now has $(slurmctld -V), not $0: see SUITES in scripts/slurm_rootfs.py" >&2
    exit 3
    ;;
esac
shift
exec .venv/bin/python -m pytest "$@"
"""


def main() -> int:
    """Make the root file system if needed, and run in it; return the exit status of the tests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version", choices=SUITES, help="version of Slurm")
    parser.add_argument("--run", action="store_true", help="run the arguments as a command instead of pytest")
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
        # Signatures are checked. A mirror may be older than sid allows, which does not matter to the tests.
        return in_root(root, command, apt_line=f"deb [check-valid-until=no] {mirror} {suite} main")


def end_with_signals() -> None:
    """Let SIGTERM and SIGHUP end this program as Ctrl-C does, so that it cleans up."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _frame: sys.exit(128 + number))


def die(complaint: str) -> NoReturn:
    """End with an error message."""
    sys.exit(f"slurm_rootfs: {complaint}")


def say(text: str) -> None:
    """Announce the next step."""
    print(f"==> {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def alone(root: Path) -> Iterator[None]:
    """Allow one run at a time in a root, since each run replaces the copy of the work tree."""
    root.parent.mkdir(exist_ok=True)
    with root.with_name(f"{root.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"Another run uses {root}; waiting for its end")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def archive() -> str:
    """The URL of this machine's Debian archive, as apt reads it from its sources."""
    with open("/etc/os-release", encoding="utf-8") as file:
        release = dict(line.strip().split("=", 1) for line in file if "=" in line)
    codename = shlex.split(release.get("VERSION_CODENAME", ""))
    targets = apt_targets()
    if not targets:
        # apt lists only targets with downloaded package lists, and a new machine may have none.
        call(["apt-get", "update", "-qq"])
        targets = apt_targets()
    for line in targets:
        uri, suite, component = line.split()
        if component == "main" and suite in (*codename, *SUITES.values()):
            return uri
    die(f"no apt source of this machine has {' '.join(codename) or 'its release'} main; see /etc/apt/sources.list.d")


def apt_targets() -> list[str]:
    """apt's package lists, one a line: the archive's URL, the suite, the component."""
    argv = ["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)", "Created-By: Packages"]
    try:
        return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=60).stdout.splitlines()
    except (OSError, subprocess.SubprocessError) as error:
        die(f"apt-get indextargets failed: {error}. This script needs a Debian machine.")


def build(root: Path, suite: str, mirror: str) -> None:
    """Run debootstrap into ``root``, unless this version of the function has made it already."""
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
    # Each run sets the archive's URL for apt.
    (root / "etc/apt/sources.list").unlink(missing_ok=True)
    (root / "etc/dpkg/dpkg.cfg.d/unsafe-io").write_text("force-unsafe-io\n", encoding="ascii")
    # Installations must not start services.
    policy = root / "usr/sbin/policy-rc.d"
    policy.write_text("#!/bin/sh\nexit 101\n", encoding="ascii")
    policy.chmod(0o755)
    stamp.write_text(wanted, encoding="ascii")


def copy_project(target: Path) -> None:
    """Copy the work tree, including uncommitted changes; keep the venv of earlier runs."""
    target.mkdir(exist_ok=True)
    for path in target.iterdir():
        if path.name == ".venv":
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    # Keep modification times, by which make sees whether dependencies have changed.
    shutil.copytree(PROJECT, target, symlinks=True, ignore=LEFT_OUT, dirs_exist_ok=True)


def in_root(root: Path, command: Sequence[str], *, apt_line: str) -> int:
    """Run the command in the copy of the work tree, with mounts and processes that end with it."""
    environment = {
        name: value for name, value in os.environ.items() if name in PASSED or name.startswith(PASSED_PREFIXES)
    }
    environment |= {"HOME": "/root", "LANG": "C.UTF-8", "PATH": PATH}
    environment |= {"APT_LINE": apt_line, "MOUNTED": " ".join([*MOUNTED, *pip_paths()])}
    inside = [*namespaces(), "bash", str(PROJECT / "scripts/in_rootfs.sh"), str(root), *command]
    return call(inside, environment=environment, check=False)


def namespaces() -> list[str]:
    """A command prefix that gives its own mounts and process ids; all processes end when this program does."""
    unshare = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"]
    return ["setpriv", "--pdeathsig", "KILL", *unshare]


def call(argv: Sequence[str], *, environment: dict[str, str] | None = None, check: bool = True) -> int:
    """Run a command to its end; if this program ends first, so does the command."""
    process = subprocess.Popen(argv, env=environment)
    try:
        status = process.wait()
    except KeyboardInterrupt:
        # The terminal also interrupts the command, and pytest then stops its daemons.
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
    """Files and directories in this machine's pip configuration: certificates, constraints, wheels."""
    argv = [sys.executable, "-m", "pip", "config", "list"]
    result = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=60)
    words = [word.strip("'\"") for line in result.stdout.splitlines() for word in line.partition("=")[2].split()]
    paths = [urlsplit(word).path for word in words if word.startswith(("/", "file:///"))]
    # An index may refer to files in its directory.
    return [path for path in paths if os.path.exists(path) and path not in MOUNTED]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
