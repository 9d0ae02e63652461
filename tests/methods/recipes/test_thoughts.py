"""Recipes on chains of thought against their formulas, computed anew one chain at a time."""

from dataclasses import replace

import pytest
import torch

import steerable as st
from steerable import UsageError
from steerable.chains.windows import AlignedChain, TokenSpan
from steerable.steering.site import Site


def mean(rows):
    return torch.stack(list(rows)).mean(0)


def pairs(chains):
    """The shorter and the longer chain of each problem."""
    tasks = sorted({chain.task_id for chain in chains})
    return [sorted((c for c in chains if c.task_id == task), key=lambda c: len(c.ids)) for task in tasks]


@pytest.fixture(scope="module")
def thoughts(chains):
    """The same chains with a paragraph break (token 3) before their last spans: before all, all but one, or the third
    alone."""
    made = []
    for number, chain in enumerate(chains):
        ids = list(chain.ids)
        for span in chain.spans[(1, 0, 2)[number % 3] :]:
            ids[span.start - 1] = 3
        made.append(replace(chain, ids=tuple(ids)))
    return made


def test_seal_is_execution_less_the_pooled_others_at_the_breaks_before_them(tiny_llama, tokenizer, thoughts, read):
    """Not the mean of two means: reflection and transition have other counts. A span that no break precedes does not
    count, wherever it stands, and the first one does where a break precedes it."""
    direction = st.recipes.seal(tiny_llama, tokenizer, thoughts, layer=2, strength=0.5)
    groups, left_out, first = {"execution": [], "others": []}, 0, 0
    for chain in thoughts:
        h = read(chain.ids)["resid_pre.2"]
        for number, span in enumerate(chain.spans):
            if chain.ids[span.start - 1] == 3:
                groups["execution" if span.label == "execution" else "others"].append(h[span.start - 1])
                first += number == 0
            else:
                left_out += number > 0
    assert len(groups["others"]) != len(groups["execution"]) and left_out and first
    expected = mean(groups["execution"]) - mean(groups["others"])
    torch.testing.assert_close(direction.at(Site("resid_pre", 2)).double(), expected, atol=1e-5, rtol=1e-5)
    assert (direction.gate, direction.strength, direction.layers) == (
        "thinking & boundary & (last_prompt | generated)",
        0.5,
        [2],
    )


@pytest.mark.filterwarnings("ignore:steering touched none")
def test_seal_touches_the_breaks_of_the_thinking_alone(tiny_llama, tokenizer, thoughts):
    """Of a prompt only the last token, and only if it is a break inside the block; of what is written all such."""
    direction = st.recipes.seal(tiny_llama, tokenizer, thoughts)

    def changed(prompt, written):
        """How many tokens are steered."""
        with st.steer(tiny_llama, direction, tokenizer=tokenizer) as handle, torch.no_grad():
            cache = tiny_llama(torch.tensor([prompt]), use_cache=True).past_key_values
            for token in written:
                cache = tiny_llama(torch.tensor([[token]]), past_key_values=cache, use_cache=True).past_key_values
        return next(iter(handle.report().values()))["tokens"]

    assert changed([1, 10, 3, 11], []) == 0 and changed([1, 10, 3, 11, 3], []) == 1
    assert changed([1, 10, 2, 3], []) == 0 and changed([4, 10, 3], []) == 0
    assert changed([1, 10, 3, 11], [12, 3, 13, 3, 2, 3]) == 2


def test_efficiency_is_the_mean_over_problems_of_shortest_less_longest(tiny_llama, tokenizer, chains, read):
    direction = st.recipes.efficiency(tiny_llama, tokenizer, chains, layer=1)
    differences, norms = [], []
    for pair in pairs(chains):
        h = [mean(read(c.ids)["resid_post.1"][3:]) for c in pair]
        differences.append(h[0] - h[1])
        norms += [x.norm() for x in h]
    u = mean(differences)
    expected = u / u.norm() * mean(norms)
    torch.testing.assert_close(direction.at(1).double(), expected, atol=1e-4, rtol=1e-4)
    assert direction.stats["pairs"] == 4 and direction.gate == "thinking" and direction.strength == 0.1


def test_efficiency_chooses_the_layer_that_tells_held_out_pairs_apart(tiny_llama, tokenizer, chains, read):
    """d' of one half of the pairs along the other half's difference, the mean of both ways."""
    rows = {
        i: [torch.stack([mean(read(pair[k].ids)[f"resid_post.{i}"][3:]) for pair in pairs(chains)]) for k in (0, 1)]
        for i in range(4)
    }

    def score(a, b):
        total = 0.0
        for fit, held in ((slice(0, None, 2), slice(1, None, 2)), (slice(1, None, 2), slice(0, None, 2))):
            u = (a[fit] - b[fit]).mean(0)
            x, y = a[held] @ u, b[held] @ u
            total += float((x.mean() - y.mean()) / ((x.var() + y.var()) / 2).sqrt()) / 2
        return total

    best = max(rows, key=lambda i: score(*rows[i]))
    assert st.recipes.efficiency(tiny_llama, tokenizer, chains).layers == [best]


def test_a_constant_of_each_problem_cancels_and_the_first_tokens_can_be_all(tiny_llama, tokenizer, chains, read):
    direction = st.recipes.efficiency(tiny_llama, tokenizer, chains, layer=1, first=2)
    starts = [[read(c.ids)["resid_post.1"][3:5].mean(0) for c in pair] for pair in pairs(chains)]
    u = mean(few - many for few, many in starts)
    cosine = torch.nn.functional.cosine_similarity(direction.at(1).double(), u, dim=0)
    assert float(cosine) == pytest.approx(1, abs=1e-6)


def test_what_the_chains_lack_is_said(tiny_llama, tokenizer, chains, thoughts):
    with pytest.raises(UsageError, match="no span labelled execution begins behind .*: none does; give chains"):
        st.recipes.seal(tiny_llama, tokenizer, chains)
    with pytest.raises(UsageError, match="labelled planning begins .* are labelled execution, reflection, transition;"):
        st.recipes.seal(tiny_llama, tokenizer, thoughts, execution=["planning"])
    with pytest.raises(UsageError, match="there is no layer 9: the model has layers 0 to 3"):
        st.recipes.seal(tiny_llama, tokenizer, chains, layer=9)
    one = [AlignedChain("a", 0, chains[0].ids, (TokenSpan("a", 3, 6),))]
    with pytest.raises(UsageError, match="no problem has answers of two lengths"):
        st.recipes.efficiency(tiny_llama, tokenizer, one)
    with pytest.raises(UsageError, match="too few to choose a layer"):
        st.recipes.efficiency(tiny_llama, tokenizer, chains[:2])


def test_a_model_without_a_think_block_is_refused(stories, shared, chains):
    from transformers import AutoTokenizer

    plain = AutoTokenizer.from_pretrained(shared / "models/stories260K")
    for recipe in (st.recipes.seal, st.recipes.efficiency):
        with pytest.raises(UsageError, match="no think block"):
            recipe(stories, plain, chains)
