"""Streamed means against one chain at a time, whole."""

import pytest
import torch

from steerable.chains.annotators import sentence_states
from steerable.chains.annotators.sentence_states import prompt_texts, sentence_means
from steerable.chains.segments import sentences
from steerable.models import loading as models
from steerable.store.errors import UsageError


def naive(loaded, prompt, chain, layer):
    """(start, end, tokens, mean) of every sentence: hooks on the block, the text encoded here."""
    seen = []
    text = prompt + chain["thinking"]
    encoded = loaded.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    hook = loaded.model.model.layers[layer].register_forward_hook(
        lambda module, inputs, output: seen.append(output if isinstance(output, torch.Tensor) else output[0])
    )
    try:
        loaded.model(torch.tensor([encoded["input_ids"]]))
    finally:
        hook.remove()
    for s in sentences(chain["thinking"]):
        begin, end = len(prompt) + s.start, len(prompt) + s.end
        own = [i for i, (a, b) in enumerate(encoded["offset_mapping"]) if a < end and b > begin]
        if own:
            yield s.start, s.end, len(own), seen[0][0, own].double().mean(0).float()


@pytest.mark.parametrize("max_tokens", [1, 500])
def test_means_equal_a_naive_pass(pocket, max_tokens):
    texts = prompt_texts(pocket.loaded.tokenizer, pocket.tasks)
    chains = pocket.chains[:8]
    reported = []
    found, means = sentence_means(
        pocket.loaded, pocket.tasks, chains, [1, 4], max_tokens=max_tokens, progress=lambda *done: reported.append(done)
    )
    assert means.shape == (2, len(found), 192) and means.dtype == torch.float32
    assert sum(done for done, _ in reported) == 8
    for place, layer in enumerate((1, 4)):
        wanted = [
            (i, *row) for i, c in enumerate(chains) for row in naive(pocket.loaded, texts[c["task_id"]], c, layer)
        ]
        assert [tuple(s) for s in found] == [row[:4] for row in wanted]
        torch.testing.assert_close(means[place], torch.stack([row[4] for row in wanted]), atol=2e-5, rtol=1e-4)


def test_long_chains_read_in_pieces_give_the_same(pocket, monkeypatch):
    whole = sentence_means(pocket.loaded, pocket.tasks, pocket.chains[:4], [3])
    stream = sentence_states.stream
    monkeypatch.setattr(sentence_states, "stream", lambda *args, **options: stream(*args, **options, chunk=7))
    pieces = sentence_means(pocket.loaded, pocket.tasks, pocket.chains[:4], [3])
    assert pieces[0] == whole[0]
    torch.testing.assert_close(pieces[1], whole[1], atol=2e-5, rtol=1e-4)


def test_sentences_that_share_a_token_both_have_it(tiny_llama, tokenizer):
    # "w1.w2" is no word of this tokenizer's, but one token all the same
    loaded = models.Loaded(tiny_llama, tokenizer)
    chain = {"task_id": "t", "sample": 0, "thinking": "w1 w2。w3 w4"}
    found, means = sentence_means(loaded, {"t": "<user> w9 <assistant> <think> "}, [chain], [0])
    assert [(s.start, s.end, s.tokens) for s in found] == [(0, 6, 2), (6, 11, 2)]
    ids = tokenizer("<user> w9 <assistant> <think> w1 w2。w3 w4", add_special_tokens=False)["input_ids"]
    hidden = tiny_llama(torch.tensor([ids]), output_hidden_states=True).hidden_states[1][0]
    torch.testing.assert_close(means[0], torch.stack([hidden[-3:-1].mean(0), hidden[-2:].mean(0)]))


def test_wanted_sentences_only_and_missing_prompts(pocket):
    found, means = sentence_means(pocket.loaded, pocket.tasks, pocket.chains[:2], [0], keep=lambda i, s: i == 1)
    assert {s.chain for s in found} == {1} and means.shape[1] == len(found) > 0
    none, empty = sentence_means(pocket.loaded, pocket.tasks, [pocket.chains[0] | {"thinking": " "}], [0])
    assert none == [] and empty.shape == (1, 0, 192)
    with pytest.raises(UsageError, match="no prompt for the chain"):
        sentence_means(pocket.loaded, {}, pocket.chains[:1], [0])
