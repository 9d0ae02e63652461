"""What equally steered texts share of the prefix cache, by vLLM's own hashes."""

from types import SimpleNamespace

import pytest
import torch

import steerable as st
from steerable.engines.vllm.plugin import register
from steerable.engines.vllm.requests import admit
from steerable.steering.gates import GATES

pytest.importorskip("vllm", reason="vLLM is not installed: `make vllm` sets it up")

BLOCK = 16
PROMPT, ANSWER = list(range(100, 136)), list(range(200, 232))  # 36 tokens: two whole blocks and a part
DIRECTION = st.Direction({st.Site("resid_post", 3): torch.ones(8)})
PROCESSOR = SimpleNamespace(
    vllm_config=SimpleNamespace(
        additional_config={"steering": {}},
        model_config=SimpleNamespace(
            hf_text_config=SimpleNamespace(num_hidden_layers=6, hidden_size=8), model="pocket"
        ),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1),
    ),
    tokenizer=st.load("pocket").tokenizer,
)


def admitted(ids, where="all", salt=None, **more):
    from vllm import SamplingParams

    names = {name: more.pop(name) for name in ("steering_prompt_tokens",) if name in more}
    extra = None if where is None else {"steering": DIRECTION.steering(0.5, where=where, **more), **names}
    params = SamplingParams(max_tokens=4, extra_args=extra)
    return admit(
        PROCESSOR, SimpleNamespace(request_id="x", sampling_params=params, prompt_token_ids=ids, cache_salt=salt)
    )


def blocks(ids, where="all", answer=(), **more):
    """The hashes of a request's whole blocks."""
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    register()
    init_none_hash(sha256)
    one = admitted(ids, where, **more)
    request = Request(
        request_id="x", prompt_token_ids=ids, sampling_params=one.sampling_params, pooling_params=None,
        cache_salt=one.cache_salt, block_hasher=get_request_block_hasher(BLOCK, sha256),
    )  # fmt: skip
    request.append_output_token_ids(list(answer))
    return list(request.block_hashes)


@pytest.mark.parametrize(
    "where, more, shared",
    [
        ("all", {}, 4),
        ("thinking", {}, 4),
        ("positions(3, 9) & ~boundary", {}, 4),
        ("generated", {}, 2),
        ("~prompt & thinking", {}, 2),
        ("last_prompt", {}, 2),
        ("all", {"schedule": "until(8)"}, 2),
        (st.selectors.latched(st.selectors.when(DIRECTION, ">", 0.1)), {}, 2),
        (st.selectors.when(DIRECTION, ">", 0.1), {}, 4),
    ],
)
def test_a_written_token_is_another_than_one_of_a_prompt(where, more, shared):
    """The next turn's prompt is this turn's and what was written: what hangs on the prompt's end is computed anew from
    the block on in which it was, and the rest is shared."""
    turn = blocks(PROMPT, where, ANSWER, **more)
    following = blocks([*PROMPT, *ANSWER, 7, 8, 9], where, **more)
    assert len(turn) == 4
    assert [a == b for a, b in zip(turn, following, strict=False)] == [True] * shared + [False] * (4 - shared)
    other = blocks([*PROMPT, *range(300, 340)], where, **more)  # another conversation that begins alike
    assert turn[:2] == other[:2] and turn[2] != other[2]
    assert turn == blocks(PROMPT, where, ANSWER, **more)


def test_scores_of_a_text_share_with_its_generation():
    whole = [*PROMPT, *ANSWER]
    turn = blocks(PROMPT, "generated", ANSWER)
    assert turn == blocks(whole, "generated", steering_prompt_tokens=len(PROMPT)) != blocks(whole, "generated")


def test_gates_of_others_share_with_equal_prompts_alone():
    GATES["first_half"] = lambda tokens: tokens.prompt
    try:
        assert blocks(PROMPT, "first_half") == blocks(PROMPT, "first_half")
        assert blocks(PROMPT, "first_half")[0] != blocks([*PROMPT, 5], "first_half")[0]
    finally:
        del GATES["first_half"]


def test_no_salt_gives_an_unsteered_text_a_steered_one():
    from vllm.exceptions import VLLMValidationError

    salt = admitted(PROMPT).cache_salt
    with pytest.raises(VLLMValidationError, match="is that of steered requests"):
        admitted(PROMPT, None, salt=salt)
    assert admitted(PROMPT, None, salt="mine").cache_salt == "mine"
    assert admitted(PROMPT, salt="mine").cache_salt not in (salt, admitted(PROMPT, "thinking", salt="mine").cache_salt)
