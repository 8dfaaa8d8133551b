"""The two tables of the job store. Columns may only be added, with a ``server_default`` where NULL has no meaning."""

from __future__ import annotations

from sqlalchemy import JSON, Boolean, Column, Float, Index, Integer, MetaData, String, Table, Text, false

metadata = MetaData()

jobs = Table(
    "jobs",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),  # the order of the queue
    Column("id", String(32), unique=True, nullable=False),  # uuid4 in hex: also the folder's name
    Column("kind", String(32), nullable=False),
    Column("title", Text, nullable=False, default=""),
    Column("owner", String(128)),  # who may see it; None: this installation's single user
    Column("config", JSON, nullable=False),
    Column("priority", Integer, nullable=False, server_default="0"),  # higher first, then the oldest
    Column("devices", Integer, nullable=False, server_default="1"),  # how many it trains on
    Column("state", String(16), nullable=False, index=True),
    Column("step", Integer, nullable=False, default=0),
    Column("total", Integer, nullable=False, default=0),
    Column("loss", Float),
    Column("reason", Text),  # why it failed
    Column("result", JSON),
    Column("attempts", Integer, nullable=False, default=0),  # starts since the last checkpoint
    Column("starts", Integer, nullable=False, server_default="0"),  # starts ever: tells one start from a later one
    Column("created", Float, nullable=False),  # times in seconds since the epoch
    Column("started", Float),
    Column("ended", Float),
    Column("heartbeat", Float),
    Column("host", String(255)),
    Column("worker", String(255)),  # "<host>/<device>" of the worker that took it
    Column("reference", Text),  # by which the executor finds its process again
    Column("cancel", Boolean, nullable=False, default=False),
    Column("pause", Boolean, nullable=False, server_default=false()),
    Column("save", Boolean, nullable=False, default=False),
    Column("sample", Boolean, nullable=False, default=False),
)

job_events = Table(
    "job_events",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("job", String(32), nullable=False),
    Column("time", Float, nullable=False),
    Column("type", String(16), nullable=False),  # progress, log, sample, saved, state
    Column("step", Integer),
    Column("data", JSON, nullable=False),
    Index("job_events_of_job", "job", "type", "number"),
)
