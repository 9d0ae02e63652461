"""Generation for every family: equal to `model.generate` row by row, and steered to a loop without a cache."""

import random

import pytest
import torch
import transformers
from conftest import slow
from tiny_families import COMMON, FAMILY_NAMES, families, tiny
from transformers import AttentionInterface, AttentionMaskInterface

import steerable as st
from steerable.engines.hf.routes import route
from steerable.engines.sampling import Decoding
from steerable.models import loading as models
from steerable.models.loading import FAMILIES
from steerable.steering import think
from steerable.steering.site import Site
from steerable.steering.spec import scaled, shift
from steerable.store.errors import UsageError

OPEN, CLOSE = 1, 2
STOPS = [7, 8]
STEPS = 12
GREEDY = Decoding(0.0)


def texts(count, seed=0, longest=12):
    rng = random.Random(seed)
    return [[rng.randrange(3, 60) for _ in range(rng.randrange(1, longest))] for _ in range(count)]


def build(name, **options):
    return ready(tiny(name, **options))


def ready(model):
    model.generation_config.eos_token_id = STOPS
    model.generation_config.pad_token_id = 0
    return model


def reference(model, prompt, steps=STEPS):
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=steps, do_sample=False)
    return out[0, len(prompt) :].tolist()


def continued(model, prompts, decoding=GREEDY, steering=(), max_new_tokens=STEPS, rows=4, tokenizer=None):
    requests = [st.Request(prompt, seed, steering, decoding) for seed, prompt in enumerate(prompts)]
    completions = st.TransformersEngine(model, tokenizer, rows=rows).generate(requests, max_new_tokens=max_new_tokens)
    return [completion.ids for completion in completions]


def added(layer, vector, thinking):
    """A hook that adds `vector` to the block's output at the tokens that `thinking` names."""

    def hook(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = hidden + torch.tensor(thinking())[None, :, None] * vector
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    return layer.register_forward_hook(hook)


def loop(model, prompt, layer, vector, opening=(OPEN,), closing=(CLOSE,)):
    """Greedy decoding of the whole text at every step, the block's output shifted at the tokens being thought."""
    ids = list(prompt)

    def thinking():
        inside, result = False, []
        for end in range(1, len(ids) + 1):
            opens = tuple(ids[:end][-len(opening) :]) == tuple(opening)
            closes = tuple(ids[:end][-len(closing) :]) == tuple(closing)
            inside = opens or (inside and not closes)
            result.append(float(inside and not opens))
        return result

    hook = added(models.blocks(model)[layer], vector, thinking)
    try:
        while len(ids) - len(prompt) < STEPS and (len(ids) == len(prompt) or ids[-1] not in STOPS):
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    finally:
        hook.remove()
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", families())
def test_greedy_equals_generate(name):
    model, prompts = build(name), texts(7)
    assert route(model, 40).slots
    assert continued(model, prompts) == [reference(model, prompt) for prompt in prompts]


@pytest.mark.parametrize("name", families())
def test_steered_thinking_equals_a_loop_without_cache(name, tokenizer):
    model = build(name)
    prompts = [[*text, OPEN, *text[:2]] for text in texts(3, 1)] + [[*text, OPEN, 5, CLOSE] for text in texts(1, 2)]
    vector = 3 * torch.randn(32, generator=torch.Generator().manual_seed(0))
    steering = (shift(Site("resid_post", 1), vector, 1.0, "thinking"),)
    steered = continued(model, prompts, rows=3, steering=steering, tokenizer=tokenizer)
    assert steered == [loop(model, prompt, 1, vector) for prompt in prompts]
    plain = [reference(model, prompt) for prompt in prompts]
    assert steered != plain
    assert continued(model, prompts, rows=3, steering=scaled(steering, 0.0), tokenizer=tokenizer) == plain


@pytest.mark.parametrize("name", families())
def test_bfloat16(name):
    """It runs, and a row says the same beside others as alone, up to a draw that rounding tips."""
    model, prompts = build(name).to(torch.bfloat16), texts(6, 3)
    options = {"decoding": Decoding(0.7, 0, 0.95), "max_new_tokens": 6}
    together = continued(model, prompts, **options, rows=6)
    alone = [continued(model, [prompt], **options)[0] for prompt in prompts[:1]]
    again = continued(model, prompts, **options, rows=6)
    assert together == again
    assert together[0][:1] == alone[0][:1]


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3", "gemma2", "qwen3_moe"])
def test_draws_do_not_depend_on_the_batch(name):
    model, prompts = build(name), texts(9, 4)
    options = {"decoding": Decoding(0.8, 30, 0.95)}
    one = continued(model, prompts, rows=9, **options)
    assert one == continued(model, prompts, rows=2, **options)


@pytest.mark.parametrize("name", ["mistral", slow("gemma3_text"), slow("gpt_oss")])
@pytest.mark.parametrize("window", [2, 3, 30, 100])
def test_windows_shorter_and_longer_than_the_text(name, window):
    model, prompts = build(name, sliding_window=window), texts(5, 5)
    assert continued(model, prompts) == [reference(model, prompt) for prompt in prompts]


def other(config, model, **options):
    """A model of a family without an entry."""
    torch.manual_seed(0)
    found = getattr(transformers, model)(getattr(transformers, config)(**options))
    return ready(found.eval().requires_grad_(False))


SEES = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
OTHERS = {
    "positions from scores": lambda: other("BloomConfig", "BloomForCausalLM", vocab_size=64, hidden_size=32, n_layer=2,
                                           n_head=4, initializer_range=0.3),
    "recurrent": lambda: other("MambaConfig", "MambaForCausalLM", vocab_size=64, hidden_size=32, num_hidden_layers=2,
                               state_size=4, initializer_range=0.3),
    "images": lambda: other("LlavaConfig", "LlavaForConditionalGeneration", vision_config=SEES, text_config={
                            **COMMON, "model_type": "llama"}),
    "learned positions": lambda: other("OPTConfig", "OPTForCausalLM", vocab_size=64, hidden_size=32, ffn_dim=48,
                                       num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
                                       max_position_embeddings=64, init_std=0.3),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_unknown_families_go_through_generate(name):
    model, prompts = OTHERS[name](), texts(8, 6, longest=5)
    way = route(model, 40)
    assert way.name == "equal lengths" and type(model).__name__ in way.why
    assert continued(model, prompts) == [reference(model, prompt) for prompt in prompts]
    sampled = {"decoding": Decoding(0.9, 0, 0.9, 0.02, 1.2)}
    assert continued(model, prompts, rows=8, **sampled) == continued(model, prompts, rows=3, **sampled)


def test_parts_are_found_once():
    """In a model, and not again in each copy of it; a text model that the table knows may be inside."""
    model, prompts = OTHERS["images"](), texts(3, 6)
    steering = (shift(Site("resid_post", 1), 3 * torch.randn(32, generator=torch.Generator().manual_seed(0))),)
    with pytest.warns(st.SteerableWarning, match="'llava' are not known") as told, st.steer(model, steering):
        expected = [reference(model, prompt) for prompt in prompts]
        assert continued(model, prompts) == expected != continued(model, prompts, steering=steering)
    assert continued(model, prompts, steering=steering) == expected
    assert len(told) == 1


def test_a_state_that_is_no_cache():
    """Mamba's, of which `steer` cannot tell what it holds; the engine feeds the tokens itself."""
    model, prompt = OTHERS["recurrent"](), texts(1, 6)[0] + [5]
    vector = 3 * torch.randn(32, generator=torch.Generator().manual_seed(0))
    added_there = shift(Site("resid_post", 1), vector, 1.0, "prompt")
    with pytest.raises(st.SteerableError, match="no key/value cache"), st.steer(model, added_there):
        reference(model, prompt, 2)
    with st.steer(model, added_there) as handle:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, use_cache=False
        )
    assert handle.tokens_fed > len(prompt) == handle.report()["resid_post.1"]["tokens"] / 4
    assert continued(model, [prompt], steering=(added_there,), max_new_tokens=4) == out[:, len(prompt) :].tolist()


@pytest.fixture
def foreign():
    """An attention implementation of somebody else's."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register("foreign", sdpa_attention_forward)
    AttentionMaskInterface.register("foreign", sdpa_mask)
    return "foreign"


@pytest.mark.parametrize("name", ["llama", *map(slow, ("mistral", "gpt2", "deepseek_v2"))])
def test_other_attention_goes_through_generate(name, foreign, tokenizer):
    model, prompts = build(name), texts(7, 7)
    expected = [reference(model, prompt) for prompt in prompts]
    slots = continued(model, prompts, decoding=Decoding(0.8, 0, 0.9))
    model.config._attn_implementation = foreign
    way = route(model, 40)
    assert way.name == "padded batches" and "'foreign'" in way.why
    assert continued(model, prompts) == expected
    assert continued(model, prompts, decoding=Decoding(0.8, 0, 0.9)) == slots  # the same draws


def test_steerings_of_each_request_through_generate(foreign, tokenizer):
    model = build("qwen3")
    prompts = [[*text, OPEN, *text[:2]] for text in texts(6, 8)]
    vector = 3 * torch.randn(32, generator=torch.Generator().manual_seed(0))
    strengths = [2.0, 0.0, 1.0, None, -1.0, 0.5]
    steerings = [() if s is None else (shift(Site("resid_post", 1), vector, s, "thinking"),) for s in strengths]
    requests = [st.Request(p, 0, s, Decoding(0.0)) for p, s in zip(prompts, steerings, strict=True)]
    made = []
    for attention in ("sdpa", foreign):
        model.config._attn_implementation = attention
        completions = st.TransformersEngine(model, tokenizer, rows=3).generate(requests, max_new_tokens=STEPS)
        made.append([c.ids for c in completions])
    assert made[0] == made[1]
    assert made[0] == [loop(model, p, 1, (s or 0.0) * vector) for p, s in zip(prompts, strengths, strict=True)]


@pytest.mark.parametrize("attention", ["sdpa", "foreign"])
def test_tags_of_several_tokens_while_rows_come_and_go(attention, foreign, tokenizer, monkeypatch):
    model = build("qwen3")
    model.config._attn_implementation = attention
    opening, vector = (1, 4), 3 * torch.randn(32, generator=torch.Generator().manual_seed(0))
    prompts = [[*text, *opening, *text[:2]] for text in texts(9, 8)]
    steering = (shift(Site("resid_post", 1), vector, 1.0, "thinking"),)

    def steered(closing):
        tags = think.ThinkTags(opening, closing)
        monkeypatch.setattr("steerable.engines.hf.hooks.think_tags", lambda tokenizer: tags)
        return continued(model, prompts, rows=3, steering=steering, tokenizer=tokenizer)

    never = steered((63, 63))
    closing = next(tuple(ids[2:4]) for ids in never if len(ids) > 8 and ids[2] != ids[3])  # which the model writes
    closed = steered(closing)
    assert closed == [loop(model, prompt, 1, vector, opening, closing) for prompt in prompts]
    assert closed != never


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2", "gpt_oss"])
def test_compiled_and_offloaded(name):
    accelerate = pytest.importorskip("accelerate")
    prompts, few = texts(5, 2), {"max_new_tokens": 4, "rows": 2}
    expected = continued(build(name), prompts)
    if name == "gpt_oss":  # compiling takes its time
        compiled = torch.compile(build(name), backend="eager")
        assert continued(compiled, prompts[:2], **few) == continued(build(name), prompts[:2], **few)
    offloaded = accelerate.cpu_offload(build(name), execution_device=torch.device("cpu"))
    assert next(offloaded.parameters()).device.type == "meta"
    assert continued(offloaded, prompts) == expected


def test_logits_that_are_not_finite_are_an_error_there_too(foreign):
    model = build("llama")
    model.config._attn_implementation = foreign
    steering = (shift(Site("resid_post", 1), torch.full((32,), 1e38), 10.0),)
    with pytest.raises(st.SteerableError, match="not finite"):
        continued(model, texts(3), steering=steering)


def test_rope_that_changes_with_the_batch():
    """LongRoPE has one set of frequencies for short texts, another for long ones."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 20,
    }
    model = build("phi3", rope_parameters=rope, original_max_position_embeddings=20, sliding_window=None)
    prompts = texts(6, 9)
    assert route(model, 20).name == "slots"
    assert route(model, 21).name == "one by one"
    assert continued(model, prompts) == [reference(model, prompt) for prompt in prompts]


def test_learned_positions_end():
    model = build("gpt2")
    with pytest.raises(UsageError, match="learned positions for 128 tokens, but .* 140"):
        continued(model, [[3] * 40], max_new_tokens=100)
    with pytest.raises(UsageError, match="learned positions for 64 tokens"):
        continued(OTHERS["learned positions"](), [[3] * 40], max_new_tokens=100)
    # rotary positions have no end
    assert COMMON["max_position_embeddings"] == 128
    assert len(continued(build("llama"), [[3] * 126], max_new_tokens=4)[0]) > 0


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_the_last_new_token_needs_no_position(name):
    """6 + 4 tokens at 9 positions; rows that are done wait for others without one."""
    if name == "gpt2":
        model = build("gpt2", n_positions=9)
    else:
        model = other("OPTConfig", "OPTForCausalLM", vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2,
                      num_attention_heads=4, max_position_embeddings=9, init_std=0.3)  # fmt: skip
    prompts = [[3 + i % 5, 4, 5, 6, 7, 8][: 6 if i % 3 else 3] for i in range(40)]
    found = continued(model, prompts, rows=40, max_new_tokens=4)
    for i in (0, 1, 2):
        ids = list(prompts[i])
        for _ in range(4):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert found[i] == ids[len(prompts[i]) :]
    with pytest.raises(UsageError, match="learned positions for 9 tokens, but .* 11"):
        continued(model, prompts, max_new_tokens=5)


def test_every_family_has_a_route():
    assert all(FAMILIES[tiny(name).config.get_text_config().model_type].route for name in FAMILY_NAMES)
    assert route(tiny("qwen3"), 30).name == "slots"
    assert route(tiny("gpt_oss"), 30).name == "slots, own attention"
