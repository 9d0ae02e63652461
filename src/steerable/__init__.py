"""Steering vectors for reasoning language models: find, select, apply and measure them.

Names are imported when they are first used, so that ``import steerable`` does not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# exported name -> module that defines it under the same name, or package that holds the module of this name
_EXPORTS = {
    "load": "models.loading",
    "Loaded": "models.loading",
    "think_tags": "steering.think",
    "Site": "steering.site",
    "tap": "models.taps",
    "selectors": "steering.gates",
    "parse_selector": "steering.gates",
    "Intervention": "steering.spec",
    "parse_steering": "steering.text",
    "Direction": "steering.direction",
    "steer": "engines.hf.hooks",
    "TransformersEngine": "engines.hf.engine",
    "VllmEngine": "engines.vllm.engine",
    "Request": "engines.base",
    "capture": "engines.activations",
    "difference_of_means": "methods.contrasts",
    "pca": "methods.contrasts",
    "contrast": "methods.text_pairs",
    "calibrate": "evals.calibration",
    "SpanMeans": "methods.span_statistics",
    "span_means": "methods.span_statistics",
    "WeightPatch": "methods.weight_patch",
    "SparseAutoencoder": "methods.sparse_autoencoders",
    "read_sae": "methods.sparse_autoencoders",
    "recipes": "methods",
    "attribute": "evals.attribution",
    "lens": "evals.logit_lens",
    "push_to_hub": "jobs.publish",
    "save_pretrained": "jobs.publish",
    "from_pretrained": "jobs.publish",
    "SteerableError": "store.errors",
    "SteerableWarning": "store.errors",
    "UsageError": "store.errors",
}
__all__ = sorted(_EXPORTS)

if TYPE_CHECKING:
    from .engines.activations import capture as capture
    from .engines.base import Request as Request
    from .engines.hf.engine import TransformersEngine as TransformersEngine
    from .engines.hf.hooks import steer as steer
    from .engines.vllm.engine import VllmEngine as VllmEngine
    from .evals.calibration import calibrate as calibrate
    from .methods import recipes as recipes
    from .methods.contrasts import difference_of_means as difference_of_means
    from .methods.contrasts import pca as pca
    from .methods.sparse_autoencoders import SparseAutoencoder as SparseAutoencoder
    from .methods.sparse_autoencoders import read_sae as read_sae
    from .methods.text_pairs import contrast as contrast
    from .methods.weight_patch import WeightPatch as WeightPatch
    from .models.loading import Loaded as Loaded
    from .models.loading import load as load
    from .models.taps import tap as tap
    from .steering.direction import Direction as Direction
    from .steering.gates import parse_selector as parse_selector
    from .steering.gates import selectors as selectors
    from .steering.site import Site as Site
    from .steering.spec import Intervention as Intervention
    from .steering.text import parse_steering as parse_steering
    from .steering.think import think_tags as think_tags
    from .store.errors import SteerableError as SteerableError
    from .store.errors import SteerableWarning as SteerableWarning
    from .store.errors import UsageError as UsageError


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{_EXPORTS[name]}", __name__)
    value: Any = getattr(module, name, None) or importlib.import_module(f".{name}", module.__name__)
    if name == "Direction":
        value.from_pairs = staticmethod(_from_pairs)
    return globals().setdefault(name, value)


def _from_pairs(*arguments: Any, **options: Any) -> Direction:
    """A direction from pairs of texts: `st.contrast`, which says what it takes, gives and refuses."""
    direction: Direction = __getattr__("contrast")(*arguments, **options)
    return direction


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
