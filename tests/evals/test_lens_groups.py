import pytest

from steerable.evals.lens_tokens import GROUPS, WORDS, group_of, token_groups, token_texts
from steerable.models.sources import pocket_path

MEMBERS = {
    "numbers": ["7", " 42", "007", "3.14", "1,000", "²"],
    "operators": [" +", "*", "->", " =", "≤", "×", "%", "\\frac", "frac", " times", "\\cdot", "-", "//"],
    "connectives": ["So", " therefore", " then", "First", "Step", " Because", "Then,"],
    "doubt": [" Wait", "wait", "Hmm", " but", " Maybe", " However,", "Perhaps"],
    "structure": ["\n", "\n\n", ".\n\n", "  ", " (", "}{", ":", "\\boxed", "boxed", "<think>", "<|end|>", "</s>",
                  "##", "**", "---", "```", "\\begin", "$", "):"],
    "punctuation": [".", ",", "?", "...", "—", "“", "!"],
    "other scripts": ["日本", " и", "한국", "ال"],
    None: [" the", "answer", "x", "x=", "a1", "begin", "end", "éa", "Ça", "π", "ª", "", "soup", "\u200b", "(x"],
}  # fmt: skip


@pytest.mark.parametrize(("group", "text"), [(group, text) for group, texts in MEMBERS.items() for text in texts])
def test_group_of(group, text):
    assert group_of(text) == group


def test_no_word_is_in_two_groups():
    words = [word for words in WORDS.values() for word in words]
    assert len(words) == len(set(words)) and set(WORDS) <= set(GROUPS)


def test_groups_are_disjoint_and_complete():
    texts = [text for texts in MEMBERS.values() for text in texts]
    found = token_groups(texts)
    assert tuple(found) == GROUPS
    for group, ids in found.items():
        assert [texts[i] for i in ids] == MEMBERS[group]


def test_the_bundled_vocabulary():
    """Its words are whole: every group that its language has is found, and little else in it."""
    from transformers import AutoTokenizer

    texts = token_texts(AutoTokenizer.from_pretrained(pocket_path()))
    found = {group: {texts[i].strip() for i in ids} for group, ids in token_groups(texts).items()}
    assert {"Wait", "Hmm", "Maybe", "Perhaps", "doubt", "Actually"} <= found["doubt"]
    assert {"So", "Then", "Therefore", "Next", "First"} <= found["connectives"]
    assert {"+", "-", "*", "/", "=", "times"} <= found["operators"]
    assert {str(n) for n in range(500)} <= found["numbers"]
    assert {"<think>", "</think>", ""} <= found["structure"] and not found["other scripts"]
