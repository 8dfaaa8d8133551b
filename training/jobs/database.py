"""The database behind the job store: its URL, its engine, and tables that are made and completed safely.

Several processes may open a new or an older database at once: one of them, holding a lock, adds what is missing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event, exc
from sqlalchemy.schema import CreateColumn

from mole_diffusion.errors import InvalidRequest

from .errors import StoreUnavailable
from .tables import metadata

URL_VARIABLE = "MOLE_DATABASE_URL"
BUSY_TIMEOUT_MS = 15_000
CONNECT_TIMEOUT = 10  # seconds
LOCK = 0x4D6F4C45  # of PostgreSQL's advisory locks; any number that is ours


def database_url(data_dir: Path) -> str:
    """The URL of the database of a data folder, which is created if it is missing."""
    data_dir.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{(data_dir / 'library.db').resolve()}"


def is_server(url: str) -> bool:
    """Whether the database is a server's, which several machines may share. Raises InvalidRequest."""
    return _parse(url).get_backend_name() != "sqlite"


def shown(url: str) -> str:
    """The URL without its password. Raises InvalidRequest."""
    return _parse(url).render_as_string(hide_password=True)


def make_engine(url: str) -> sa.Engine:
    """An engine; for SQLite with WAL, a busy timeout and synchronous=NORMAL. Raises InvalidRequest."""
    parsed = _parse(url)
    try:
        options = {"connect_timeout": CONNECT_TIMEOUT} if parsed.drivername == "postgresql+psycopg" else {}
        engine = sa.create_engine(parsed, pool_pre_ping=is_server(url), connect_args=options)
    except ImportError as error:
        raise InvalidRequest(
            f"The database {shown(url)} needs the Python package {error.name}, which is not installed; "
            "for PostgreSQL: pip install 'psycopg[binary]'."
        ) from None
    except exc.NoSuchModuleError:
        raise InvalidRequest(
            f"Databases of the kind {parsed.drivername!r} are unknown; use postgresql+psycopg://user@host/name."
        ) from None
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
    return engine


def prepare(engine: sa.Engine) -> None:
    """Create the tables, or add the columns that an older version did not have. Raises StoreUnavailable."""
    try:
        if _missing(engine):
            _complete(engine)
    except (exc.OperationalError, exc.InterfaceError) as error:
        raise StoreUnavailable(
            f"The database {engine.url.render_as_string(hide_password=True)} does not answer "
            f"({_first_line(error)}); check that it runs, and its address and rights."
        ) from None


def _parse(url: str) -> sa.URL:
    try:
        parsed = sa.make_url(url)
    except exc.ArgumentError:  # its text would show the password
        raise InvalidRequest(
            "The database is given by a URL such as postgresql+psycopg://user:password@host/name; this is none."
        ) from None
    if parsed.drivername in ("postgres", "postgresql"):
        return parsed.set(drivername="postgresql+psycopg")
    return parsed


def _first_line(error: exc.DBAPIError) -> str:
    return str(error.orig).strip().partition("\n")[0].rstrip(".")


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    for pragma in (f"busy_timeout={BUSY_TIMEOUT_MS}", "journal_mode=WAL", "synchronous=NORMAL"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _missing(bind: sa.Engine | sa.Connection) -> list[tuple[sa.Table, list[sa.Column[Any]]]]:
    """Tables with the columns that the database lacks; a table that lacks them all does not exist."""
    inspector, found = sa.inspect(bind), []
    tables = set(inspector.get_table_names())
    for table in metadata.sorted_tables:
        known = {column["name"] for column in inspector.get_columns(table.name)} if table.name in tables else set()
        if lacking := [column for column in table.columns if column.name not in known]:
            found.append((table, lacking))
    return found


def _complete(engine: sa.Engine) -> None:
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        elif engine.dialect.name == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(LOCK)))
        lacking = _missing(connection)
        metadata.create_all(connection)
        for table, columns in lacking:
            if len(columns) < len(table.columns):
                for column in columns:
                    definition = CreateColumn(column).compile(dialect=engine.dialect)
                    connection.execute(sa.DDL(f"ALTER TABLE {table.name} ADD COLUMN {definition}"))
                if "reference" in {column.name for column in columns}:
                    _keep_processes(connection)
        connection.commit()


def _keep_processes(connection: sa.Connection) -> None:
    """Jobs that run while the program is replaced keep their process: it was in two columns once."""
    words = "reference = 'local:' || host || ':' || pid || ':' || pid_started || ':'"
    connection.execute(sa.text(f"UPDATE jobs SET {words} WHERE state = 'running' AND pid IS NOT NULL"))
