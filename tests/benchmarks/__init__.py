"""Measurements: what composing costs beside the base and beside other tools. Nothing here is a timed assertion."""
