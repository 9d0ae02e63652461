"""Text survives the tokenizer, numbers are single tokens, and the folder gives the same one back."""

import random

import pytest
from transformers import AutoTokenizer

from steerable.models.pocket import recipe
from steerable.models.pocket.families import LARGEST_NUMBER
from steerable.steering.think import think_tags

TEXTS = [
    "",
    " ",
    "  two  blanks \t tab\r\nline\n\n\nthree",
    "So 12 * 3 = 36.\n\nTry 600.",
    "naïve Zürich, 東京, 🙂‍↔️, ﷽, e\u0301 and \u200b",
    "x=1;if(x){y()} # 1234567 007 -5 3.14",
    "the_snake, CamelCase, don't",
]


@pytest.fixture(scope="module")
def folder(untrained, pocket_tokenizer, tmp_path_factory):
    out = tmp_path_factory.mktemp("model")
    recipe.save(untrained, pocket_tokenizer, out)
    return out


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives(pocket_tokenizer, text):
    assert pocket_tokenizer.decode(ids(pocket_tokenizer, text)) == text


def test_any_text_survives(pocket_tokenizer):
    rng = random.Random(0)
    for _ in range(300):
        points = [rng.choice((rng.randrange(1, 0xD800), rng.randrange(32, 127))) for _ in range(rng.randrange(60))]
        text = "".join(map(chr, points))
        assert pocket_tokenizer.decode(ids(pocket_tokenizer, text)) == text


def test_numbers_and_words_of_the_language_are_single_tokens(pocket_tokenizer):
    assert all(len(ids(pocket_tokenizer, f" {n}")) == 1 for n in range(LARGEST_NUMBER + 1))
    assert len(ids(pocket_tokenizer, f" {LARGEST_NUMBER + 1}")) > 1
    chain = recipe.training_chain(100_000)  # one that the vocabulary was not made from
    text = recipe.prompt_text(chain["question"]) + recipe.chain_text(chain)
    assert len(ids(pocket_tokenizer, text)) <= 1.1 * len(ids(pocket_tokenizer, " ".join(text.split()))) + 10
    known = [i for i in ids(pocket_tokenizer, text) if len(pocket_tokenizer.convert_ids_to_tokens(i)) > 1]
    assert len(known) > 0.6 * len(ids(pocket_tokenizer, text))


def test_the_tags_and_turns_are_single_tokens(pocket_tokenizer):
    tags = think_tags(pocket_tokenizer)
    assert tags.opened_by_template
    assert ids(pocket_tokenizer, "<think></think>") == [*tags.open, *tags.close]
    assert pocket_tokenizer.decode(tags.open, skip_special_tokens=True) == "<think>"
    assert ids(pocket_tokenizer, "<|end|>") == [pocket_tokenizer.eos_token_id]


def test_the_saved_folder_gives_the_same_tokenizer(pocket_tokenizer, folder):
    loaded = AutoTokenizer.from_pretrained(folder)
    assert len(loaded) == len(pocket_tokenizer)
    for text in [*TEXTS, recipe.chain_text(recipe.training_chain(1)), recipe.prompt_text("What is 2 + 2?")]:
        first, second = (t(text, return_offsets_mapping=True) for t in (pocket_tokenizer, loaded))
        assert first["input_ids"] == second["input_ids"] and first["offset_mapping"] == second["offset_mapping"]
    assert loaded.chat_template == pocket_tokenizer.chat_template
    assert (loaded.eos_token, loaded.pad_token, loaded.padding_side) == ("<|end|>", "<|pad|>", "left")


def test_offsets_are_characters(pocket_tokenizer):
    text = "So 12 * 3 = 36.\n\nNaïve 🙂 end."
    offsets = pocket_tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    assert offsets[0] == (0, 2) and offsets[-1][1] == len(text)
    assert all(start <= end for start, end in offsets)
    assert {text[start:end] for start, end in offsets} >= {"So", " 12", " *", "\n\n"}


def rendered(tokenizer, *messages, prompt=True):
    turns = [{"role": role, "content": content} for role, content in messages]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)


def test_one_turn_is_the_training_prompt(pocket_tokenizer):
    assert rendered(pocket_tokenizer, ("user", " What is 2 + 2? ")) == recipe.prompt_text("What is 2 + 2?")
    assert recipe.prompt_text("Q") == "<|user|>Q<|assistant|><think>\n"


def test_earlier_turns_keep_their_answers_only(pocket_tokenizer):
    text = rendered(
        pocket_tokenizer, ("user", "Q1"), ("assistant", "<think>\nHmm.\n</think>\n\n4"), ("user", "Q2"), prompt=False
    )
    assert text == "<|user|>Q1<|assistant|>4<|end|><|user|>Q2"
    assert rendered(pocket_tokenizer, ("user", "Q1"), ("assistant", "4"), ("user", "Q2")).endswith(
        "4<|end|><|user|>Q2<|assistant|><think>\n"
    )
