"""What can be trained: one file per task, all run by :func:`training.loop.run`."""

from __future__ import annotations
