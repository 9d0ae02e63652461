"""What the prefix cache may share. Texts that are steered differently have other salts. Equal steerings share, but for
one thing: a token that was written in one turn of a conversation is a part of the prompt in the next, and what hangs on
where the prompt ends (`prompt`, `generated`, `last_prompt`, `latched`, schedules over tokens) does something else there
than when it was written. So the blocks from the end of the prompt on are also known by where it ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from steerable.engines.vllm.lowering import Lane
from steerable.engines.vllm.settings import KEY
from steerable.steering.gates import Gate

_BY_TEXT = ("all", "thinking", "answer", "boundary", "positions", "tokens")
_BY_PROMPT = ("prompt", "generated", "last_prompt")


def hangs_on_prompt(lanes: Sequence[Lane]) -> bool:
    """Whether the lanes do other things at the same tokens where the prompt ends elsewhere."""
    return any(
        lane.schedule is not None
        or any(row.is_latched for row in lane.rows)
        or any(gate.uses(*_BY_PROMPT) for gate in lane.gates)
        for lane in lanes
    )


def may_look_ahead(lanes: Sequence[Lane]) -> bool:
    """Whether what they do before the end of the prompt may hang on it, too: gates of other packages."""
    return any(not _is_known(gate) for lane in lanes for gate in lane.gates)


def _is_known(gate: Gate) -> bool:
    return all(map(_is_known, gate.parts)) if gate.parts else gate.op in (*_BY_TEXT, *_BY_PROMPT)


def with_prompt(original: Callable[..., Any], request: Any, start: int, end: int, *rest: Any) -> Any:
    """vLLM's `generate_block_hash_extra_keys`: what a block of a request's tokens start ... end - 1 is known by besides
    these tokens and the blocks before it."""
    keys, following = original(request, start, end, *rest)
    wire = (getattr(request.sampling_params, "extra_args", None) or {}).get(KEY)
    if isinstance(wire, dict) and wire.get("hangs_on_prompt"):
        prompt = wire["prompt_tokens"] or request.num_prompt_tokens
        if end >= prompt:
            keys = (*(keys or ()), ("steering_prompt", str(prompt)))
    return keys, following


def is_keyed_by_block() -> bool:
    """Whether this vLLM asks `with_prompt`; where it does not, salts must say where prompts end."""
    from vllm.v1.core import kv_cache_utils

    return hasattr(getattr(kv_cache_utils, "generate_block_hash_extra_keys", None), "steerable")
