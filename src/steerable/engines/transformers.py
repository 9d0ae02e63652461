"""The engine of Hugging Face transformers, and its hooks, as other rooms import them: `hf/` is its inside."""

from steerable.engines.hf.engine import TransformersEngine
from steerable.engines.hf.hooks import Handle, steer
from steerable.engines.hf.precision import dtype_of, is_narrow
from steerable.engines.hf.products import GenerationDtype
from steerable.engines.hf.routes import check_ids, check_length, position_table, positions
from steerable.engines.hf.scoring import score_tokens

__all__ = [
    "Handle",
    "GenerationDtype",
    "TransformersEngine",
    "check_ids",
    "check_length",
    "dtype_of",
    "is_narrow",
    "position_table",
    "positions",
    "score_tokens",
    "steer",
]
