"""The commands of ``python -m mole_diffusion``: each turns arguments into a record; only ``__main__`` prints."""
