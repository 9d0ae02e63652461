"""What vLLM's scheduler does to a batch of differently steered requests leaves each of them what it is: prompts in
chunks, prefixes from the cache, preemption, several texts of a prompt, clients that leave, drafts."""

import pytest
import torch
from vllm_engines import (
    CROWDED,
    PARITY,
    add,
    difference,
    generated,
    metric,
    preemptions,
    run,
    scores,
    start,
)

import steerable as st
from steerable.engines.sampling import Decoding

pytest.importorskip("vllm", reason="vLLM is not installed: `make vllm` sets it up")
pytestmark = pytest.mark.slow


def direction(reference):
    v = torch.randn(reference.model.config.hidden_size, generator=torch.Generator().manual_seed(5))
    return st.Direction({st.Site("resid_post", layer): 8 * v / v.norm() for layer in (1, 3)})


@pytest.fixture(scope="module")
def twice(prompts, steerings):
    """Prompts and steerings of a batch in which everything is asked for twice, so that the second finds the first
    one's prefix."""
    return [p for p in prompts for _ in range(2)], [steering for steering in steerings for _ in range(2)]


@pytest.fixture(scope="module")
def outputs(crowded, twice):
    return generated(crowded, *twice, max_tokens=32)


def test_chunks_caches_and_preemption(crowded, reference, prompts, twice, outputs):
    assert min(map(len, prompts)) > CROWDED["max_num_batched_tokens"]
    assert preemptions(outputs) > 5
    assert sum(output.num_cached_tokens > 64 for output in outputs) > len(outputs) // 8
    assert difference(reference, twice[1], outputs) < PARITY
    assert difference(reference, [()] * len(outputs), outputs) > 0.1  # steering did something


@pytest.mark.parametrize("where", ["generated", "prompt", "last_prompt", "all"])
def test_turns_of_a_conversation(crowded, reference, prompts, where):
    """What was written is a part of the next turn's prompt, and is found in the cache where it is the same there."""
    steering = [direction(reference).steering(where=where)]
    [first] = generated(crowded, prompts, steering, max_tokens=48)
    following = [*first.prompt_token_ids, *first.outputs[0].token_ids, *prompts[1][-9:]]
    [second] = generated(crowded, [following], steering, max_tokens=8)
    assert second.num_cached_tokens >= 64  # of the prompt
    assert second.num_cached_tokens >= len(following) - 42 or where != "all"
    assert difference(reference, steering, [second]) < PARITY


def test_unsteered_requests_keep_their_bits(twice, outputs):
    """Against an engine without the plugin, whose cache is kept apart in the same way."""
    plain = start("pocket", is_plain=True, **CROWDED)
    salts = [str(steering) if steering else None for steering in twice[1]]
    others = generated(plain, twice[0], [()] * len(outputs), max_tokens=32, salts=salts)
    assert preemptions(others) > 5
    pairs = [pair for *pair, steering in zip(outputs, others, twice[1], strict=True) if not steering]
    assert len(pairs) > len(outputs) // 8
    for one, other in pairs:
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
        assert torch.equal(scores(one.outputs[0]), scores(other.outputs[0]))


def test_several_texts_of_a_prompt(crowded, reference, prompts, steerings):
    rows = steerings[::3]
    outputs = generated(crowded, prompts, rows, n=3, temperature=1.5, max_tokens=24)
    assert all(len(output.outputs) == 3 for output in outputs)
    assert sum(len({tuple(text.token_ids) for text in output.outputs}) > 1 for output in outputs) > len(rows) // 2
    assert difference(reference, rows, outputs) < PARITY


def test_clients_that_leave(crowded, reference, prompts, steerings):
    """The others go on as if they had been alone, and nothing of those that left stays behind."""
    names = [str(n) for n in range(len(steerings))]
    internal = add(crowded, names, prompts, steerings, max_tokens=24)
    done = run(crowded, steps=12)
    crowded.llm.llm_engine.abort_request(internal[::2], internal=True)
    assert crowded.llm.llm_engine.has_unfinished_requests()
    done |= run(crowded)
    staying = [n for n in range(len(steerings)) if str(n) in done]
    assert set(range(1, len(steerings), 2)) <= set(staying) != set(range(len(steerings)))
    rows = [steerings[n] for n in staying]
    assert difference(reference, rows, [done[str(n)] for n in staying]) < PARITY
    generated(crowded, prompts, [()], max_tokens=1)  # a step in which vLLM tells who is gone
    steps = crowded.llm.llm_engine.model_executor.driver_worker.worker.steering
    assert not any(steps._requests.values())
    assert all(len(tracker._free) == len(tracker._table) - 1 for tracker in steps._trackers.values())
    assert len(steps._lines) == steps.tokens.lines


def test_drafts(reference, prompts, steerings):
    """Speculation by n-grams: tokens of a draft that is rejected leave nothing behind."""
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
    options = {"max_model_len": 192, "max_num_seqs": 8, "disable_log_stats": False, "speculative_config": drafts}
    engine = start("pocket", is_plain=True, additional_config={"steering": {}}, **options)
    outputs = generated(engine, prompts, steerings)
    assert 0 < metric(engine, "spec_decode_num_accepted_tokens") < metric(engine, "spec_decode_num_draft_tokens")
    assert difference(reference, steerings, outputs) < PARITY


def test_a_call_that_was_stopped_leaves_no_texts_behind(crowded, prompts, monkeypatch):
    """They would be the answers to the next call's requests."""
    one, llm = [st.Request(prompts[0], decoding=Decoding(0.0))], crowded.llm.llm_engine
    expected = crowded.generate(one, max_new_tokens=4)
    steps = iter([llm.step] * 3)
    with monkeypatch.context() as patch, pytest.raises(StopIteration):  # as Ctrl-C in the middle
        patch.setattr(llm, "step", lambda: next(steps)())
        crowded.generate(one, max_new_tokens=40)
    assert crowded.generate(one, max_new_tokens=4) == expected
