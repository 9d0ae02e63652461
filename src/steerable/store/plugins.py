"""What others add to the library: installed packages by entry points, anybody by `module:function`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from steerable.store.errors import SteerableError, UsageError


@cache
def load_plugins(group: str) -> dict[str, Any]:
    """The objects that installed packages offer under an entry-point group, such as `steerable.metrics`, by name.

    Raises SteerableError, naming the package, for an entry point that cannot be imported.
    """
    plugins = {}
    for point in entry_points(group=group):
        try:
            plugins[point.name] = point.load()
        except Exception as error:  # another package's code
            package = point.dist.name if point.dist else "an installed package"
            raise SteerableError(
                f"the entry point {point.name!r} of {package} in {group} cannot be loaded "
                f"({type(error).__name__}: {error}): mend or uninstall the package"
            ) from error
    return plugins


def function_at(path: str, option: str, choices: str) -> Callable[..., Any]:
    """The function at `module:function`; the module may lie in the working folder.

    Args:
        path: the module and the function's name.
        option: what asks for it, as in "--estimator".
        choices: what could stand there, and what the function takes and returns.

    Raises:
        UsageError: it cannot be imported, or is no function.

    Example:
        >>> function_at("math:sqrt", "--root", "module:function, number -> number")(9)
        3.0
    """
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
    module, _, name = path.partition(":")
    try:
        function = getattr(import_module(module), name)
    except Exception as error:  # somebody else's module: importing it may raise anything
        raise UsageError(f"{option} is {path!r}, which cannot be imported ({error}): expected {choices}") from None
    if not callable(function):
        raise UsageError(f"{option} is {path!r}, which is no function: expected {choices}")
    return function  # type: ignore[no-any-return]
