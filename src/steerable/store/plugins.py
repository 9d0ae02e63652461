"""What other installed packages add to the library, by the entry points of Python packaging."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points
from typing import Any

from steerable.store.errors import SteerableError


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
