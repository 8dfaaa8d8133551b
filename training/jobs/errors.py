"""Errors of background jobs, in the tree of :mod:`mole_diffusion.errors`."""

from __future__ import annotations

from mole_diffusion.errors import MoleError


class JobLost(MoleError):
    """The job is no longer this start's: it ended, or its lease passed and it was started again elsewhere."""


class StoreUnavailable(MoleError):
    """The job database does not answer: it is locked, restarting, full, or nothing listens at its address."""
