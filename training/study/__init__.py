"""The evidence on the demo world: one file per question, each with ``jobs`` (what is missing) and ``table``."""
