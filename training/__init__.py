"""Training: objectives, data, one loop, tasks, jobs and the command line. Imports the core, never the app."""

from __future__ import annotations
