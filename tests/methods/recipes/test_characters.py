"""Persona vectors and the Assistant Axis against their formulas."""

import pytest
import torch

import steerable as st
from steerable import UsageError
from steerable.steering.direction import Direction
from steerable.steering.maps import Clip
from steerable.steering.site import Site


def test_the_axis_weighs_each_role_the_same_and_its_floor_is_a_quantile(tiny_llama, tokenizer, texts, read):
    default, roles = texts[0][:5], {"pirate": texts[1][:1], "ghost": texts[1][1:8]}
    program = st.recipes.assistant_axis(tiny_llama, tokenizer, default, roles, layers=[1, 2])
    for part in program:
        name = str(part.site)
        means = {
            group: torch.stack([read(tokenizer(text)["input_ids"])[name][1:].mean(0) for text in some])
            for group, some in {"default": default, **roles}.items()
        }
        axis = means["default"].mean(0) - (means["pirate"].mean(0) + means["ghost"].mean(0)) / 2
        v = axis / axis.norm()
        tau = torch.cat(list(means.values())) @ v
        tau = tau.quantile(0.25)
        h = 3 * torch.randn(1, 40, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        expected = h - (h @ v - tau).clamp(max=0)[..., None] * v
        torch.testing.assert_close(part.apply(h), expected, atol=1e-5, rtol=1e-5)
        assert isinstance(part.map, Clip) and str(part.gate) == "all"


def test_a_chats_last_message_is_what_is_read(tiny_llama, tokenizer, read):
    chat = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3 w4 w5"}]
    program = st.recipes.assistant_axis(
        tiny_llama, tokenizer, [chat], {"ghost": ["w9 w10 w11"]}, layers=[2], quantile=0.0
    )
    whole = tokenizer.apply_chat_template(chat, tokenize=False)
    ids = tokenizer(whole[: whole.index("w5") + 2])["input_ids"]  # without what closes the message
    a = read(ids)["resid_post.2"][-3:].mean(0)
    b = read(tokenizer("w9 w10 w11")["input_ids"])["resid_post.2"][1:].mean(0)
    v = (a - b) / (a - b).norm()
    torch.testing.assert_close(program[0].basis[:, 0], v, atol=1e-5, rtol=1e-5)
    assert program[0].map.lo == pytest.approx(float(min(a @ v, b @ v)), abs=1e-4)


def test_a_floor_is_a_ceiling_of_the_opposite_vector():
    """floor(v, tau) = ceiling(-v, -tau), which is what the Assistant Axis' paper and its code differ by."""
    v = torch.randn(16, generator=torch.Generator().manual_seed(0))
    v = v / v.norm()
    h = torch.randn(2, 50, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for tau in (-0.7, 0.0, 0.4):
        (floor,) = Direction({Site("resid_post", 1): v}).steering(map=Clip.floor(tau))
        (ceiling,) = Direction({Site("resid_post", 1): -v}).steering(map=Clip.ceiling(-tau))
        torch.testing.assert_close(floor.apply(h), ceiling.apply(h), atol=1e-12, rtol=0)
        assert torch.equal(floor.apply(floor.apply(h)) @ v.double() >= tau - 1e-6, torch.ones(2, 50).bool())


def test_a_ceiling_leaves_as_many_replies_alone_as_a_floor(tiny_llama, tokenizer, texts):
    groups = texts[0][:5], {"pirate": texts[1][:5]}
    for bound, quantile in (("floor", 0.25), ("ceiling", 0.75)):
        made = st.recipes.assistant_axis(tiny_llama, tokenizer, *groups, layers=[2], bound=bound)
        given = st.recipes.assistant_axis(tiny_llama, tokenizer, *groups, layers=[2], bound=bound, quantile=quantile)
        assert made == given


def test_the_axis_refuses(tiny_llama, tokenizer):
    with pytest.raises(UsageError, match="'floor' or 'ceiling'"):
        st.recipes.assistant_axis(tiny_llama, tokenizer, ["w1 w2"], {"a": ["w1 w3"]}, bound="cap")
    with pytest.raises(UsageError, match="the default persona and of one role"):
        st.recipes.assistant_axis(tiny_llama, tokenizer, ["w1 w2"], {"a": []})
    chat = [{"role": "user", "content": "w1 w2"}]
    with pytest.raises(UsageError, match="must end with the assistant's message"):
        st.recipes.assistant_axis(tiny_llama, tokenizer, [chat], {"a": ["w1 w3"]})


@pytest.fixture(scope="module")
def pocket():
    return st.load("pocket", device="cpu")


def test_a_persona_is_the_difference_of_the_replies_means(pocket):
    """The replies are the model's own, and are read behind the question; a judge leaves pairs out as wholes."""
    model, tokenizer = pocket
    judged = []

    def keep(a, b):
        judged.append((a, b))
        return len(judged) != 2

    made = st.recipes.persona(
        model, tokenizer, "happy", "sad", prompts=3, max_new_tokens=5, layer=2, keep=keep, strength=1
    )
    assert len(judged) == 3 and made.stats["pairs"] == 2 and made.behaviour == "happy"
    from steerable.methods.personas import persona_pairs
    from steerable.steering.think import render_messages

    means = []
    for side, number in ((0, 0), (0, 2), (1, 0), (1, 2)):
        chat = persona_pairs(tokenizer, "happy", "sad", 3)[side][number]
        prompt = tokenizer(render_messages(tokenizer, chat), add_special_tokens=False)["input_ids"]
        written = tokenizer(judged[number][side], add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            states = model(torch.tensor([[*prompt, *written]]), output_hidden_states=True).hidden_states[3][0]
        means.append(states[len(prompt) :].double().mean(0))
    expected = (means[0] + means[1] - means[2] - means[3]) / 2
    torch.testing.assert_close(made.at(2).double(), expected, atol=1e-3, rtol=1e-3)


def test_a_purified_persona_has_nothing_of_the_other_trait(pocket):
    trait = torch.randn(192, generator=torch.Generator().manual_seed(0))
    other = Direction({Site("resid_post", 2): trait}, model_id="another")
    with pytest.warns(st.SteerableWarning, match="this direction was made on 'another'"):
        made = st.recipes.persona(
            *pocket, "happy", "sad", prompts=2, max_new_tokens=4, layer=2, against=[other], strength=1
        )
    assert abs(made.cosine(other)[Site("resid_post", 2)]) < 1e-6
    with pytest.raises(UsageError, match="no pair of 2 replies counts"):
        st.recipes.persona(*pocket, "happy", "sad", prompts=2, max_new_tokens=4, keep=lambda a, b: False)
    with pytest.raises(UsageError, match="two kinds of person"):
        st.recipes.persona(*pocket, "happy", "happy")
