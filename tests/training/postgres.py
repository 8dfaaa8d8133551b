"""A real PostgreSQL server in a temporary folder: a Unix socket, no TCP, gone with the tests."""

from __future__ import annotations

import glob
import itertools
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa

PASSWORD = "a-password-that-nobody-may-read"
_numbers = itertools.count()


def find(program: str) -> str | None:
    """A program of PostgreSQL: on the path, or where Debian puts it."""
    installed = sorted(glob.glob(f"/usr/lib/postgresql/*/bin/{program}"))
    return shutil.which(program) or (installed[-1] if installed else None)


def unprivileged() -> str | None:
    """The account to run the server as: PostgreSQL refuses root."""
    if os.geteuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in known else "nobody"


@contextmanager
def server() -> Iterator[str]:
    """Start a server and give the folder of its socket."""
    initdb, postgres, control = find("initdb"), find("postgres"), find("pg_ctl")
    if initdb is None or postgres is None or control is None:
        pytest.skip("PostgreSQL's server is not installed (Debian and Ubuntu: apt-get install postgresql)")
    user, folder = unprivileged(), tempfile.mkdtemp(prefix="mole-pg-")
    if user is not None:
        os.chown(folder, pwd.getpwnam(user).pw_uid, -1)
    data = f"{folder}/data"
    quiet = {"user": user, "cwd": folder, "check": True, "stdout": subprocess.DEVNULL}
    try:
        subprocess.run([initdb, "-D", data, "-U", "mole", "-A", "trust", "--no-sync", "-E", "UTF8"], **quiet)
        options = f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off -c max_connections=60"
        subprocess.run([control, "-D", data, "-w", "-l", f"{folder}/log", "-o", options, "start"], **quiet)
        try:
            yield folder
        finally:
            subprocess.run([control, "-D", data, "-m", "immediate", "stop"], **quiet)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def new_schema() -> Iterator[Callable[[], str]]:
    """Gives the URL of an empty schema of one server for each call."""
    with server() as folder:
        address = f"postgresql+psycopg://mole:{PASSWORD}@/postgres?host={folder}"
        engine = sa.create_engine(address)

        def make() -> str:
            name = f"schema{next(_numbers)}"
            with engine.begin() as connection:
                connection.execute(sa.schema.CreateSchema(name))
            return f"{address}&options=-csearch_path%3D{name}"

        yield make
        engine.dispose()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind."""
    if request.param == "postgresql":
        return request.getfixturevalue("new_schema")()
    return f"sqlite:///{tmp_path / 'library.db'}"
