"""What gates are trained on: one file per objective."""

from __future__ import annotations
