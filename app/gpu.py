"""ZeroGPU lends a GPU to decorated functions; everywhere else the decoration does nothing.

This module is imported before torch: on ZeroGPU the ``spaces`` package must come first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

try:
    import spaces
except ImportError:  # not installed outside Spaces by choice: nothing to lend
    spaces = None

__all__ = ["on_gpu"]

Function = TypeVar("Function", bound=Callable)


def on_gpu(seconds: Callable[..., int]) -> Callable[[Function], Function]:
    """Run the function where the GPU is; ``seconds`` estimates its duration from the same arguments."""

    def decorate(function: Function) -> Function:
        return function if spaces is None else cast(Function, spaces.GPU(duration=seconds)(function))

    return decorate
