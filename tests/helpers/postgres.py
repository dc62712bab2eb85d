"""A private PostgreSQL: its own data directory and port, an unprivileged user, and no files left afterwards."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gateway_slurm.testing.processes import free_port

READY = 30.0  # seconds
USER, PASSWORD = "gateway", "open-sesame"  # of the databases of a test run


def _program(name: str) -> str:
    """The path of a PostgreSQL program of the newest version, which Debian does not put into PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: float(path.parts[4]))
    program = str(found[-1]) if found else shutil.which(name)
    assert program, f"{name} is not installed: make setup"
    return program


class PrivatePostgres:
    """A server on 127.0.0.1, which a test may start and stop repeatedly."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.data = directory / "data"
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        # PostgreSQL refuses to run as root.
        self._account = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
        self._made = 0

    def url(self, database: str = "postgres", password: str = PASSWORD) -> str:
        """The value for ``store_url``."""
        return f"postgresql://{USER}:{password}@127.0.0.1:{self.port}/{database}"

    def new_database(self) -> str:
        """Make an empty database; return its URL."""
        self._made += 1
        name = f"store{self._made}"
        self.sql(f"CREATE DATABASE {name}")
        return self.url(name)

    def sql(self, statement: str, database: str = "postgres") -> str:
        """Run an SQL statement; return the output of psql."""
        argv = [_program("psql"), "-qAtX", "-v", "ON_ERROR_STOP=1", "-c", statement, self.url(database)]
        return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=READY).stdout.strip()

    def make(self) -> None:
        """Make the data directory."""
        self.directory.mkdir(mode=0o700, exist_ok=True)
        secret = self.directory / "password"
        secret.write_text(PASSWORD)
        if self._account is not None:
            for path in (self.directory, secret):
                os.chown(path, self._account.pw_uid, self._account.pw_gid)
        argv = [_program("initdb"), "-D", str(self.data), "-U", USER, "-A", "scram-sha-256", "-E", "UTF8"]
        self._run([*argv, "--no-sync", "--locale=C", f"--pwfile={secret}"])

    def up(self) -> None:
        """Start the server and wait until it answers."""
        settings = (
            "listen_addresses=127.0.0.1",
            f"unix_socket_directories={self.directory}",
            "fsync=off",
            "max_connections=60",
        )
        argv = [_program("postgres"), "-D", str(self.data), "-p", str(self.port)]
        argv += [word for setting in settings for word in ("-c", setting)]
        with (self.directory.parent / "postgres.log").open("ab") as log:
            self._process = subprocess.Popen(argv, stdout=log, stderr=log, **self._as_user())
        deadline = time.monotonic() + READY
        while not self._answers():
            assert time.monotonic() < deadline, (self.directory.parent / "postgres.log").read_text()
            time.sleep(0.02)

    def down(self, how: int = signal.SIGINT) -> None:
        """Stop the server: SIGINT ends the sessions, SIGQUIT is a crash."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(READY)
            self._process = None

    def restart(self, how: int = signal.SIGINT) -> None:
        """Stop the server and start it again on the same port."""
        self.down(how)
        self.up()

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self.directory.parent / "postgres.log").read_text()
        try:
            self.sql("SELECT 1")
        except subprocess.CalledProcessError:
            return False
        return True

    def _run(self, argv: list[str]) -> None:
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=READY, **self._as_user())
        assert done.returncode == 0, done.stdout + done.stderr

    def _as_user(self) -> dict[str, object]:
        if self._account is None:
            return {"cwd": self.directory}
        return {"user": self._account.pw_uid, "group": self._account.pw_gid, "extra_groups": [], "cwd": self.directory}


@contextmanager
def private_postgres() -> Iterator[PrivatePostgres]:
    """A server that answers; stopped and removed at the end."""
    base = Path(tempfile.mkdtemp(prefix="gsp-", dir="/tmp"))
    base.chmod(0o755)
    server = PrivatePostgres(base / "postgres")
    try:
        server.make()
        server.up()
        yield server
    finally:
        server.down()
        shutil.rmtree(base)
