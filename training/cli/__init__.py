"""The sub-commands of ``python -m training``: one file each, with ``add_arguments`` and ``main``."""
