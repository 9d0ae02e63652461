"""Steering vectors for reasoning language models: find, select, apply and measure them.

Names are imported when they are first used, so that ``import steerable`` does not load torch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# exported name -> module that defines it under the same name
_EXPORTS = {
    "load": "models",
    "Loaded": "models",
    "think_tags": "think",
    "Site": "sites",
    "tap": "sites",
    "selectors": "gates",
    "parse_selector": "gates",
    "Intervention": "interventions",
    "Direction": "directions",
    "steer": "engines.hooks",
    "capture": "capture",
    "difference_of_means": "estimators.difference_of_means",
    "pca": "estimators.pca",
    "SpanMeans": "estimators.span_means",
    "attribute": "attribution",
    "lens": "lens",
    "SteerableError": "errors",
    "SteerableWarning": "errors",
    "UsageError": "errors",
}
__all__ = sorted(_EXPORTS)

if TYPE_CHECKING:
    from .capture import capture as capture
    from .directions import Direction as Direction
    from .engines.hooks import steer as steer
    from .errors import SteerableError as SteerableError
    from .errors import SteerableWarning as SteerableWarning
    from .errors import UsageError as UsageError
    from .estimators.difference_of_means import difference_of_means as difference_of_means
    from .estimators.pca import pca as pca
    from .gates import parse_selector as parse_selector
    from .gates import selectors as selectors
    from .interventions import Intervention as Intervention
    from .models import Loaded as Loaded
    from .models import load as load
    from .sites import Site as Site
    from .sites import tap as tap
    from .think import think_tags as think_tags


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    return globals().setdefault(name, value)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _CallableModule(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)


class _Package(ModuleType):
    # Importing the module steerable.capture binds it to the name `capture` here, also the function's.
    # Such a module answers calls for its function, so that the order of imports does not matter.
    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and _EXPORTS.get(name) == name:
            value.__class__ = _CallableModule
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
