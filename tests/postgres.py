"""A PostgreSQL server of its own, from Debian's packages, on a free loopback port, as an unprivileged user."""

import contextlib
import importlib.util
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path


class Server:
    """A running server and its ways to be stopped."""

    def __init__(self, tools: Path, user: str | None, folder: Path) -> None:
        self.tools, self.user, self.folder = tools, user, folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._run("initdb", "-A", "trust", "-U", "tester", "-E", "UTF8", "--no-sync")
        self.databases = 0
        self.start()

    def _run(self, tool: str, *words: str) -> None:
        command = [str(self.tools / tool), "-D", str(self.folder / "data"), *words]
        log = (self.folder / "setup.log").open("a")
        subprocess.run(command, check=True, stdout=log, stderr=log, user=self.user, cwd=self.folder)

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self.folder} -c fsync=off"
        self._run("pg_ctl", "-w", "-o", options, "-l", str(self.folder / "server.log"), "start")

    def stop(self, mode: str = "fast") -> None:
        self._run("pg_ctl", "-w", "-m", mode, "stop")

    def version(self) -> str:
        """Such as 15.10."""
        told = subprocess.run([self.tools / "pg_ctl", "--version"], check=True, capture_output=True, text=True).stdout
        return told.split()[2]

    def url(self) -> str:
        """The URL of a new database."""
        self.databases += 1
        name = f"runs{self.databases}"
        import psycopg  # noqa: PLC0415

        with psycopg.connect(f"postgresql://tester@127.0.0.1:{self.port}/postgres", autocommit=True) as connection:
            connection.execute(f"create database {name}")  # type: ignore[call-overload]
        return f"postgresql://tester@127.0.0.1:{self.port}/{name}"


def why_not() -> str:
    """Why no server can be started here; empty where one can."""
    if _tools() is None:
        return "no PostgreSQL server is installed (Debian: apt-get install postgresql)"
    if importlib.util.find_spec("psycopg") is None:
        return "psycopg is not installed (pip install 'psycopg[binary]')"
    if os.geteuid() == 0 and _user() is None:
        return "a PostgreSQL server does not run as root, and there is no user postgres or nobody"
    return ""


def _tools() -> Path | None:
    places = [Path(place).resolve().parent for place in [shutil.which("initdb")] if place]
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((place for place in places if (place / "initdb").exists() and (place / "pg_ctl").exists()), None)


def _user() -> str | None:
    names = {entry.pw_name for entry in pwd.getpwall()}
    return next((name for name in ("postgres", "nobody") if name in names), None)


@contextlib.contextmanager
def running_server() -> Iterator[Server]:
    tools = _tools()
    assert tools is not None
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    user = _user() if os.geteuid() == 0 else None
    if user is not None:
        shutil.chown(folder, user)
    server = None
    try:
        server = Server(tools, user, folder)
        yield server
    finally:
        if server is not None:
            with contextlib.suppress(subprocess.CalledProcessError):  # it was stopped already
                server.stop("immediate")
        shutil.rmtree(folder, ignore_errors=True)
