"""Background jobs: a table, a worker that starts one child process at a time, and the child's entry."""

from __future__ import annotations
