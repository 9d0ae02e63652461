"""The invariants of steering, over interventions, sites, selectors and models."""

import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import StaticCache

from steerable.engines.hf.hooks import steer
from steerable.models import loading as models
from steerable.models.taps import tap, width_at
from steerable.steering.direction import Direction
from steerable.steering.gates import selectors, when
from steerable.steering.maps import Clip
from steerable.steering.site import KINDS, Site
from steerable.steering.spec import Intervention, shift
from steerable.steering.tokens import SequenceState
from steerable.store.errors import SteerableError, SteerableWarning, UsageError

OPEN, CLOSE, BREAK = 1, 2, 3
WHERE = [
    "all",
    "prompt",
    "generated",
    "thinking & ~boundary",
    "answer | last_prompt",
    "positions(2, 6)",
    "tokens(7)",
]
CLOSE_ENOUGH = {"atol": 2e-5, "rtol": 2e-5}  # another order of additions


def text(seed, length=12):
    """A row that opens and closes a think block; never the padding id."""
    row = torch.randint(4, 12, (length,), generator=torch.Generator().manual_seed(seed))
    row[2 + seed % 2], row[4], row[8] = OPEN, BREAK, CLOSE
    return row


PROMPTS = [6, 4, 5]
DIRECTION = Direction({Site("resid_post", 1): torch.ones(32), Site("resid_post", 2): torch.ones(32)}, behaviour="happy")
ROWS = [text(seed, 12 - seed) for seed in range(3)]


def direction_for(model, kinds=("resid_post",), layers=None, scale=1.0, **about):
    layers = range(models.n_layers(model)) if layers is None else layers
    generator = torch.Generator().manual_seed(0)
    sites = [Site(kind, layer) for kind in kinds for layer in layers]
    vectors = {s: scale * torch.randn(width_at(model, s.kind), generator=generator) for s in sites}
    return Direction(vectors, **about)


def logits(model, ids, **options):
    return model(ids if ids.dim() == 2 else ids[None], **options).logits


def replay(model, direction, rows, prompts, left=False, **options):
    """Teacher-forced logits of each row, padded in one batch."""
    width = max(map(len, rows)) + 2
    ids, mask = (
        torch.zeros(len(rows), width, dtype=torch.long),
        torch.zeros(len(rows), width, dtype=torch.long),
    )
    parts = [slice(width - len(r), width) if left else slice(0, len(r)) for r in rows]
    for i, (row, part) in enumerate(zip(rows, parts, strict=True)):
        ids[i, part], mask[i, part] = row, 1
    position = (mask.cumsum(1) - 1).clamp_min(0)
    with steer(model, direction, **options) as handle:
        handle.prompt_lengths(prompts)
        out = model(ids, attention_mask=mask, position_ids=position).logits
    return [out[i, part] for i, part in enumerate(parts)], handle.report()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rescale", [False, True])
def test_zero_strength_is_bit_exact(model, kind, rescale):
    plain = logits(model, ROWS[0])
    direction = direction_for(model, [kind])
    for strength in (0, 0.0, torch.zeros(1)):
        with steer(model, direction, strength=strength, rescale=rescale) as handle:
            assert torch.equal(logits(model, ROWS[0]), plain)
    assert all(site["tokens"] == 0 for site in handle.report().values())


@pytest.mark.parametrize("kind", KINDS)
def test_restoration(model, kind):
    plain = logits(model, ROWS[0])
    direction = direction_for(model, [kind])

    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    before = hooks()
    with steer(model, direction):
        assert not torch.equal(logits(model, ROWS[0]), plain)
    assert torch.equal(logits(model, ROWS[0]), plain)
    with pytest.raises(ZeroDivisionError), steer(model, direction):
        _ = 1 / 0
    assert torch.equal(logits(model, ROWS[0]), plain) and hooks() == before


def naive(model, direction, row, positions, rescale):
    """Steering of the given positions of one row, by editing the activations with the definition."""

    def edit(site):
        def fn(h):
            new = h.clone()
            for t in positions:
                new[0, t] = h[0, t] + 0.5 * direction.vectors[site]
                if rescale:
                    new[0, t] *= h[0, t].norm() / new[0, t].norm()
            return new

        return fn

    with tap(model, {site: edit(site) for site in direction.vectors}):
        return logits(model, row)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("rescale", [False, True])
def test_oracle_for_selectors(model, tokenizer, where, rescale):
    row, prompt = ROWS[0], PROMPTS[0]
    positions = {
        "all": range(12),
        "prompt": range(6),
        "generated": range(6, 12),
        "thinking & ~boundary": [3, 5, 6, 7],
        "answer | last_prompt": [5, 9, 10, 11],
        "positions(2, 6)": range(2, 6),
        "tokens(7)": [t for t in range(12) if row[t] == 7],
    }[where]
    direction = direction_for(model)
    options = {"strength": 0.5, "where": where, "rescale": rescale, "tokenizer": tokenizer}
    (out,), report = replay(model, direction, [row], [prompt], **options)
    torch.testing.assert_close(out, naive(model, direction, row, positions, rescale)[0], **CLOSE_ENOUGH)
    assert all(site["tokens"] == len(positions) for site in report.values())


@pytest.mark.parametrize("kind", KINDS)
def test_oracle_for_sites(model, kind):
    direction = direction_for(model, [kind])
    with steer(model, direction, strength=0.5, where="positions(3, 7)"):
        out = logits(model, ROWS[0])
    torch.testing.assert_close(out, naive(model, direction, ROWS[0], range(3, 7), False), **CLOSE_ENOUGH)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rescale", [False, True])
def test_locality(model, kind, rescale):
    """Other positions are bit-identical at the site, and logits before the first steered token are too."""
    site, plain, seen = Site(kind, 1), {}, {}
    after = {site: lambda h: seen.__setitem__("h", h)}
    with tap(model, {site: lambda h: plain.__setitem__("h", h)}):
        before = logits(model, ROWS[0])
    direction = direction_for(model, [kind], [1])
    with steer(model, direction, where="positions(5, 8)", rescale=rescale), tap(model, after):
        steered = logits(model, ROWS[0])
    # a second tap at resid_mid sees the edited attention output, so the same activation at every site
    assert torch.equal(seen["h"][:, :5], plain["h"][:, :5]) and torch.equal(seen["h"][:, 8:], plain["h"][:, 8:])
    assert not (seen["h"][:, 5:8] == plain["h"][:, 5:8]).all(-1).any()
    assert torch.equal(steered[:, :5], before[:, :5]) and not torch.equal(steered[:, 5:], before[:, 5:])


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("left", [False, True])
def test_padding_and_batch_parity(model, tokenizer, where, left):
    direction = direction_for(model, KINDS)
    options = {"strength": 0.3, "where": where, "tokenizer": tokenizer}
    together, report = replay(model, direction, ROWS, PROMPTS, left, **options)
    touched = 0
    for row, prompt, batched in zip(ROWS, PROMPTS, together, strict=True):
        with warnings.catch_warnings():  # in one row alone a gate may stay shut
            warnings.simplefilter("ignore", SteerableWarning)
            with steer(model, direction, **options) as handle:
                handle.prompt_lengths([prompt])
                alone = logits(model, row)[0]
        torch.testing.assert_close(batched, alone, **CLOSE_ENOUGH)
        touched += handle.report()["resid_post.1"]["tokens"]
    assert report["resid_post.1"]["tokens"] == touched


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("chunks", [[6] + [1] * 6, [3, 3, 1, 5], [1] * 12])
def test_cache_parity(model, tokenizer, where, chunks):
    direction = direction_for(model, KINDS)
    options = {"strength": 0.3, "where": where, "tokenizer": tokenizer}
    row = ROWS[0]
    (whole,), report = replay(model, direction, [row], [6], **options)
    with steer(model, direction, **options) as handle:
        handle.prompt_lengths([6])
        parts, cache, start = [], None, 0
        for length in chunks:
            out = model(row[None, start : start + length], past_key_values=cache, use_cache=True)
            cache, start = out.past_key_values, start + length
            parts.append(out.logits[0])
    torch.testing.assert_close(torch.cat(parts), whole, **CLOSE_ENOUGH)
    again = handle.report()
    for site, figures in report.items():
        assert again[site]["tokens"] == figures["tokens"]
        assert again[site]["relative_change"] == pytest.approx(figures["relative_change"], rel=1e-3)


@pytest.mark.parametrize("where", WHERE)
def test_generate_with_and_without_a_cache(model, tokenizer, where):
    """Also left-padded, and with a static cache, whose mask has four dimensions."""
    ids = torch.stack([torch.cat([torch.zeros(2).long(), ROWS[1][:4]]), ROWS[0][:6]])
    mask = (ids > 0).long()
    direction = direction_for(model)
    outputs, reports = [], []
    for how in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        with steer(model, direction, strength=0.4, where=where, tokenizer=tokenizer) as handle:
            options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0} | how
            scores = model.generate(
                ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **options
            )
        outputs.append((scores.sequences, torch.stack(scores.logits)))
        reports.append(handle.report()["resid_post.1"]["tokens"])
    for sequences, values in outputs[1:]:
        assert torch.equal(sequences, outputs[0][0])
        torch.testing.assert_close(values, outputs[0][1], **CLOSE_ENOUGH)
    if where == "all":
        assert reports[0] == reports[2] == 4 + 6 + 2 * 5


def test_fires_at_prefill_and_every_step(model):
    direction, calls = direction_for(model, layers=[1]), []
    with (
        steer(model, direction, strength=2.0),
        tap(model, {Site("resid_post", 1): lambda h: calls.append(h)}),
    ):
        model.generate(ROWS[0][None, :6], max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    plain = []
    with tap(model, {Site("resid_post", 0): lambda h: plain.append(h)}):
        model.generate(ROWS[0][None, :6], max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    assert [h.shape[1] for h in calls] == [6, 1, 1, 1, 1] == [h.shape[1] for h in plain]


def test_strength_by_row(model):
    direction, ids = direction_for(model), torch.stack([ROWS[0][:9], ROWS[1][:9], ROWS[2][:9]])
    strengths = torch.tensor([0.5, 0.0, -1.0])
    plain = logits(model, ids)
    for where in ("all", "positions(2, 5)"):
        with steer(model, direction, strength=strengths, where=where) as handle:
            mixed = logits(model, ids)
        assert handle.report()["resid_post.0"]["tokens"] == (18 if where == "all" else 6)
        assert torch.equal(mixed[1], plain[1])
        for row in (0, 2):
            with steer(model, direction, strength=float(strengths[row]), where=where):
                torch.testing.assert_close(mixed[row], logits(model, ids)[row], **CLOSE_ENOUGH)
    for given in (strengths, strengths.tolist()):
        with steer(model, direction, strength=given), pytest.raises(SteerableError, match="3 rows"):
            logits(model, ids[:1])


def test_set_strength(tiny_llama):
    direction, plain = direction_for(tiny_llama), logits(tiny_llama, ROWS[0])
    with steer(tiny_llama, direction, strength=0) as handle:
        assert torch.equal(logits(tiny_llama, ROWS[0]), plain) and handle.strength == 0
        handle.set_strength(1.5)
        steered = logits(tiny_llama, ROWS[0])
        handle.set_strength(0)
        assert torch.equal(logits(tiny_llama, ROWS[0]), plain)
        with pytest.raises(UsageError, match="finite"):
            handle.set_strength(math.nan)
    with steer(tiny_llama, direction, strength=1.5):
        assert torch.equal(logits(tiny_llama, ROWS[0]), steered)
    assert handle.tokens_fed == 12 and handle.report()["resid_post.0"]["tokens"] == 12


def test_report(model):
    """Against the activations themselves, at a site that nothing before it changed."""
    direction, seen = direction_for(model, layers=[2]), []
    with tap(model, {Site("resid_post", 2): seen.append}):
        logits(model, ROWS[0])
    with steer(model, direction, strength=-0.7, where="positions(1, 7)") as handle:
        logits(model, ROWS[0])
    h = seen[0][0, 1:7].double()
    new = h - 0.7 * direction.at(2).double()
    report = handle.report()["resid_post.2"]
    assert report["tokens"] == 6
    assert report["relative_change"] == pytest.approx(float(((new - h).norm(dim=1) / h.norm(dim=1)).mean()), rel=1e-4)
    cosine = torch.nn.functional.cosine_similarity(new, h)
    assert report["angle"] == pytest.approx(float(cosine.acos().rad2deg().mean()), rel=1e-4)
    with steer(model, direction, track=False) as handle:
        logits(model, ROWS[0])
    assert handle.report()["resid_post.2"] == {"tokens": 12, "dose": None, "relative_change": None, "angle": None}


def test_report_over_many_steps(tiny_llama):
    """Kept and measured in portions, the padding left out."""
    direction = direction_for(tiny_llama, layers=[0])
    ids = torch.stack([ROWS[0][:6], torch.cat([torch.zeros(2).long(), ROWS[1][:4]])])
    with steer(tiny_llama, direction) as handle:
        for _ in range(40):
            logits(tiny_llama, ids, attention_mask=(ids > 0).long())
    with steer(tiny_llama, direction) as once:
        logits(tiny_llama, ids, attention_mask=(ids > 0).long())
    many, one = handle.report()["resid_post.0"], once.report()["resid_post.0"]
    assert many["tokens"] == 400 and one["tokens"] == 10 == once.tokens_fed
    assert many["relative_change"] == pytest.approx(one["relative_change"])


def test_several_at_one_site_act_in_order(tiny_llama):
    site, v = Site("resid_post", 1), torch.randn(32, generator=torch.Generator().manual_seed(5))
    first, second = shift(site, v, 0.5, rescale=True), shift(site, -v, 0.3, selectors.positions(0, 4))
    with tap(tiny_llama, {site: lambda h: second.apply(first.apply(h), torch.arange(12)[None] < 4)}):
        expected = logits(tiny_llama, ROWS[0])
    with steer(tiny_llama, [first, second]) as handle:
        assert torch.equal(logits(tiny_llama, ROWS[0]), expected)
    assert handle.report()["resid_post.1"]["tokens"] == 12
    with pytest.raises(SteerableError, match="different strengths"):
        _ = handle.strength


def test_another_map(tiny_llama):
    """The coordinates in a subspace are taken out, and the others stay."""
    site, basis = Site("resid_post", 1), torch.eye(32)[:, :2]
    ablate = Intervention(site, basis, Clip.ablate())
    seen = []
    with steer(tiny_llama, ablate), tap(tiny_llama, {site: seen.append}):
        logits(tiny_llama, ROWS[0])
    assert seen[0][..., :2].abs().max() < 1e-6 and seen[0][..., 2:].abs().max() > 0.1


def test_layers_and_defaults_of_the_direction(tiny_llama, tokenizer):
    direction = direction_for(tiny_llama, strength=0.5, gate="thinking")
    with steer(tiny_llama, direction, tokenizer=tokenizer, layers=np.int64(2)) as handle:
        logits(tiny_llama, ROWS[0])
    assert list(handle.report()) == ["resid_post.2"] and handle.report()["resid_post.2"]["tokens"] == 5
    assert handle.strength == 0.5


def test_an_engine_feeds(tiny_llama, tokenizer):
    """The engine's own state stands, whatever the inputs look like."""
    direction = direction_for(tiny_llama)
    with steer(tiny_llama, direction, where="thinking", tokenizer=tokenizer) as handle:
        assert handle.needs_tokens
        state = SequenceState(handle.tags)
        state.start(1)
        handle.feed(state.advance(ROWS[0][None]))
        out = tiny_llama(inputs_embeds=tiny_llama.get_input_embeddings()(ROWS[0][None])).logits
    with steer(tiny_llama, direction, where="thinking", tokenizer=tokenizer):
        assert torch.equal(out, logits(tiny_llama, ROWS[0]))
    with steer(tiny_llama, direction) as handle:
        assert not handle.needs_tokens


def test_new_sequences_start_anew(tiny_llama, tokenizer):
    direction = direction_for(tiny_llama)
    with steer(tiny_llama, direction, where="thinking", tokenizer=tokenizer) as handle:
        one = logits(tiny_llama, ROWS[0][:6])
        logits(tiny_llama, torch.stack(ROWS[:1] * 3))
        assert torch.equal(logits(tiny_llama, ROWS[0][:6]), one)
    assert handle.tokens_fed == 48


def test_bfloat16(tiny_qwen2):
    import copy

    model = copy.deepcopy(tiny_qwen2).to(torch.bfloat16)
    plain, direction = logits(model, ROWS[0]), direction_for(model, KINDS)
    with steer(model, direction, strength=0):
        assert torch.equal(logits(model, ROWS[0]), plain)
    for kind in KINDS:
        with steer(model, direction_for(model, [kind], [1]), where="positions(5, 8)"):
            steered = logits(model, ROWS[0])
        assert steered.dtype == torch.bfloat16
        assert torch.equal(steered[:, :5], plain[:, :5]) and not torch.equal(steered, plain)


def test_warnings(tiny_llama, tokenizer):
    direction = direction_for(tiny_llama)
    with (
        pytest.warns(SteerableWarning, match="touched none of the 12 tokens") as caught,
        steer(tiny_llama, direction, where="tokens(63)"),
    ):
        logits(tiny_llama, ROWS[0])
    assert caught[0].filename == __file__
    other = direction_for(tiny_llama, model_id="someone/else")
    tiny_llama.config._name_or_path = "this/one"
    try:
        with (
            pytest.warns(SteerableWarning, match="'someone/else', the model is 'this/one'") as caught,
            steer(tiny_llama, other),
        ):
            logits(tiny_llama, ROWS[0])
    finally:
        tiny_llama.config._name_or_path = ""
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with steer(tiny_llama, direction, strength=0, where="tokens(63)"):
            logits(tiny_llama, ROWS[0])
        with steer(tiny_llama, direction, where="tokens(63)"):
            pass  # nothing was fed


def test_a_site_that_never_ran(tiny_llama):
    """A layer that is skipped is told, although other layers steered."""
    direction, block = direction_for(tiny_llama), tiny_llama.model.layers[3]
    inner = torch.nn.ModuleList(list(tiny_llama.model.layers)[:3])
    with pytest.warns(SteerableWarning, match="resid_post.3"), steer(tiny_llama, direction):
        tiny_llama.model.layers = inner
        tiny_llama.config.num_hidden_layers = 3
        try:
            logits(tiny_llama, ROWS[0])
        finally:
            tiny_llama.model.layers = inner.append(block)
            tiny_llama.config.num_hidden_layers = 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"directions": Direction({Site("resid_post", 1): torch.ones(9)})}, "width 9, but the model's"),
        ({"directions": Direction({Site("resid_post", 50): torch.ones(32)})}, "layers 0 to 3"),
        ({"directions": Direction({Site("resid_post", 1): torch.ones(2, 32)}, map="ablate")}, "not independent"),
        ({"directions": Direction({Site("resid_post", 1): torch.ones(33, 32)}, map="ablate")}, "not independent"),
        ({"directions": []}, "one direction at least"),
        ({"directions": ()}, "one direction at least"),
        ({"directions": [()]}, "one direction at least"),
        ({"directions": {}}, "a steering holds interventions"),
        ({"directions": Path("happy.safetensors")}, "a steering holds interventions"),
        ({"directions": [[DIRECTION]]}, "no Direction"),
        ({"layers": [7]}, "no vector at layer 7"),
        ({"directions": DIRECTION.steering(), "layers": [7]}, "no vector at layer 7"),
        ({"directions": [*DIRECTION.steering()], "layers": [1, 7]}, "no vector at layer 7"),
        ({"where": when({Site("resid_post", 0): torch.ones(9)}, ">", 0.1)}, "width 9, but the model's"),
        ({"where": when({Site("mlp_act", 0): torch.ones(32)}, ">", 0.1)}, "width 32, but the model's"),
        ({"where": 3}, "a gate is a text"),
        ({"strength": math.inf}, "finite"),
        ({"strength": "1"}, "a number or a tensor"),
        ({"strength": torch.ones(2, 2)}, "shape"),
        ({"where": "thinking"}, "needs the tokenizer"),
        ({"where": "~boundary"}, "needs the tokenizer"),
        ({"where": "sometimes"}, "not a selector"),
    ],
)
def test_errors_before_any_forward(tiny_llama, change, message):
    arguments = {"directions": direction_for(tiny_llama)} | change
    with pytest.raises(UsageError, match=message), steer(tiny_llama, **arguments):
        pytest.fail("steering began")
    assert not tiny_llama.model._forward_pre_hooks


def test_the_report_names_the_layers_that_were_steered(tiny_llama):
    for directions in (DIRECTION, DIRECTION.steering(), list(DIRECTION.steering())):
        with steer(tiny_llama, directions, layers=2, where="all", strength=0.5) as handle:
            logits(tiny_llama, ROWS[0])
        assert handle.report().steering == "0.5 happy[2]" and list(handle.report()) == ["resid_post.2"]


def test_vectors_with_nan_are_refused(tiny_llama):
    direction = direction_for(tiny_llama)
    direction.vectors[Site("resid_post", 1)][0] = math.nan
    with pytest.raises(UsageError, match="NaN"), steer(tiny_llama, direction):
        pass


def test_errors_in_use(tiny_llama):
    direction, embeds = direction_for(tiny_llama), tiny_llama.get_input_embeddings()(ROWS[0][None])
    with steer(tiny_llama, direction) as handle:
        tiny_llama(inputs_embeds=embeds)  # "all" does not need to know the tokens
    assert handle.tokens_fed == 12
    with steer(tiny_llama, direction, where="prompt") as handle:
        with pytest.raises(UsageError, match="needs input_ids"):
            tiny_llama(inputs_embeds=embeds)
        handle.prompt_lengths([1, 2])
        with pytest.raises(UsageError, match="2 rows, the batch 1"):
            logits(tiny_llama, ROWS[0])
    cache = tiny_llama(ROWS[0][None], use_cache=True).past_key_values
    with (
        pytest.raises(SteerableError, match="holds 12 tokens, but steering has seen 0"),
        steer(tiny_llama, direction, where="prompt"),
    ):
        tiny_llama(ROWS[0][None, :1], past_key_values=cache)
    with steer(tiny_llama, direction), pytest.raises(SteerableError, match="call the model, not its blocks"):
        tiny_llama.model.layers[0](
            embeds, position_embeddings=tiny_llama.model.rotary_emb(embeds, torch.arange(12)[None])
        )


def test_static_cache_by_hand(tiny_llama, tokenizer):
    direction, row = direction_for(tiny_llama), ROWS[0]
    options = {"where": "thinking", "tokenizer": tokenizer}
    (whole,), _ = replay(tiny_llama, direction, [row], [6], **options)
    cache = StaticCache(config=tiny_llama.config, max_cache_len=16)
    with steer(tiny_llama, direction, **options):
        first = tiny_llama(row[None, :6], past_key_values=cache).logits[0]
        rest = [
            tiny_llama(row[None, t : t + 1], past_key_values=cache, position_ids=torch.tensor([[t]])).logits[0]
            for t in range(6, 12)
        ]
    torch.testing.assert_close(torch.cat([first, *rest]), whole, **CLOSE_ENOUGH)


def test_start_and_remove(tiny_llama):
    """The same as a `with`, once; nothing stays behind."""
    direction, ids = Direction({Site("resid_post", 1): torch.ones(32)}), torch.arange(4, 10)[None]
    plain = tiny_llama(ids).logits
    with steer(tiny_llama, direction):
        steered = tiny_llama(ids).logits
    handle = steer(tiny_llama, direction)
    assert torch.equal(tiny_llama(ids).logits, plain)  # not yet
    assert handle.start() is handle
    assert torch.equal(tiny_llama(ids).logits, steered)
    handle.remove()
    handle.remove()
    assert torch.equal(tiny_llama(ids).logits, plain)
    with pytest.raises(UsageError, match="started before"):
        handle.start()
    head, row = str(handle.report()).splitlines()[1:]
    assert head.split() == ["site", "tokens", "dose", "change", "angle"]
    assert row.split()[:2] == ["resid_post.1", "6"] and len(row) == len(head)
    assert "- " in str(steer(tiny_llama, direction).report())  # not measured
