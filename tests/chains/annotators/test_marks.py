"""The annotation parser: what annotators write, and 1,000 fuzzed replies whose true spans are known."""

import random
import re
import time

import pytest

from steerable.chains.annotators.marks import Span, parse
from steerable.chains.records import LABELS

CHAIN = (
    "Okay, we need the sum. Take 7 - 6 = 1. Wait, no.\n\nTake 7 - 6 = 1. So \\[x = a[i]\\] lies in [0, 1], see [4].\n"
    "For example, “x” could be 3 — or 4. I doubt that."
)
TRUTH = [
    ("initializing", "Okay, we need the sum."),
    ("deduction", "Take 7 - 6 = 1."),
    ("backtracking", "Wait, no."),
    ("deduction", "Take 7 - 6 = 1. So \\[x = a[i]\\] lies in [0, 1], see [4]."),
    ("example-testing", "For example, “x” could be 3 — or 4."),
    ("uncertainty-estimation", "I doubt that."),
]


def spans_of(chain, segments):
    """Spans of consecutive segments, found one after the other."""
    spans, position = [], 0
    for label, text in segments:
        start = chain.index(text, position)
        position = start + len(text)
        if label is not None:
            spans.append(Span(label, start, position))
    return spans


EXPECTED = spans_of(CHAIN, TRUTH)


def render(segments, opener='["{}"]', closer='["end-section"]', joint=" "):
    return joint.join(f"{opener.format(label)} {text} {closer}".strip() for label, text in segments)


@pytest.mark.parametrize(
    "opener",
    ['["{}"]', "[{}]", "['{}']", "[“{}”]", "[ {} ]", '**["{}"]**', '`["{}"]`', '\\["{}"\\]', '[\\"{}\\"]', '[["{}"]]']
    + ["[1. {}]", '["5. {}"]', '[3. "{}"]', "[2) {}]", "[4: {}]", "[label: {}]", '- ["{}"]:', '### ["{}"]\n'],
)
@pytest.mark.parametrize("closer", ['["end-section"]', "[end-section]", "[/deduction]", "", "[END SECTION]", '["end"]'])
def test_every_style_of_marks_gives_the_same_spans(opener, closer):
    found = parse(render(TRUTH, opener, closer), CHAIN)
    assert list(found.spans) == EXPECTED
    assert (found.segments, found.unplaced, found.mended, found.unknown) == (6, 0, 0, {})
    assert found.coverage == 1.0


@pytest.mark.parametrize("spell", [str.upper, str.title, lambda s: s.replace("-", "_"), lambda s: s.replace("-", " ")])
def test_spelling_of_labels(spell):
    reply = render([(spell(label), text) for label, text in TRUTH])
    assert list(parse(reply, CHAIN).spans) == EXPECTED


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.replace(" ", "  \n"),
        lambda r: "Sure! Here is the annotated text:\n\n```text\n" + r + "\n```",
        lambda r: "Here you are:\n" + r + "\n\nI hope that this helps. Shall I go on?",
        lambda r: "<think>[deduction] Take 7? [/deduction]</think>" + r,
        lambda r: r.replace("“x”", '"x"').replace("—", "-"),
        lambda r: r.replace("\\[", "[").replace("\\]", "]"),
        lambda r: r.replace("7 - 6", "7-6").replace("[0, 1]", "[0,1]"),
        lambda r: r.replace("Wait, no.", "**Wait**, no."),
    ],
)
def test_what_does_not_matter(change):
    found = parse(change(render(TRUTH)), CHAIN)
    assert list(found.spans) == EXPECTED
    assert found.unplaced == 0


def test_an_unknown_label_is_refused_and_its_text_belongs_to_nobody():
    for mark in ('["summarizing"]', "[summarizing]", "[7. summarizing]", '["deduction", "backtracking"]'):
        segments = [(label if k != 2 else "?", text) for k, (label, text) in enumerate(TRUTH)]
        for closer in ('["end-section"]', ""):
            found = parse(render(segments, closer=closer).replace('["?"]', mark), CHAIN)
            assert list(found.spans) == [span for k, span in enumerate(EXPECTED) if k != 2]
            assert sum(found.unknown.values()) == 1
            assert found.segments == 5


@pytest.mark.parametrize("number", ["[1]", "[4]", '["2"]', "[0-5]"])
def test_a_bare_number_is_no_label(number):
    assert parse(f"{number} Take 7 - 6 = 1.", CHAIN).spans == ()


def test_brackets_of_the_chain_are_text():
    chain = "The list [blank] has [end] and ['step one']. We see [deduction rules] apply. Fine then."
    reply = f'["deduction"] {chain[: chain.index(" We")]} ["end-section"] [backtracking] {chain[chain.index("We") :]}'
    found = parse(reply, chain)
    assert [chain[s.start : s.end] for s in found.spans] == [chain[: chain.index(" We")], chain[chain.index("We") :]]
    assert found.unknown == {}


def test_a_chain_that_holds_marks_is_refused_where_they_stand():
    chain = 'I would print ["deduction"] here. Then we go on. That is all.'
    reply = (
        '["initializing"] I would print ["deduction"] here. ["end-section"] ["deduction"] Then we go on. [/deduction]'
    )
    for span in parse(reply, chain).spans:
        assert (span.label, chain[span.start : span.end]) == ("initializing", 'I would print ["deduction"] here.')


def test_repeated_text_is_searched_forward_from_the_span_before():
    chain = "Wait. One is odd. Wait. Two is even. Wait. Three is odd."
    reply = "[deduction] One is odd. [backtracking] Wait. [deduction] Two is even. [backtracking] Wait. [/backtracking]"
    found = parse(reply, chain)
    assert [(s.label, s.start) for s in found.spans] == [
        ("deduction", 6),
        ("backtracking", 18),
        ("deduction", 24),
        ("backtracking", 37),
    ]


def test_an_ambiguous_place_is_no_place():
    chain = "First of all, A. Wait. Some words that nobody has labelled. Wait. Then comes B, at last."
    reply = "[initializing] First of all, A. [backtracking] Wait. [deduction] Then comes B, at last."
    found = parse(reply, chain)
    assert [s.label for s in found.spans] == ["initializing", "deduction"]
    assert (found.unplaced, found.unplaced_characters) == (1, 5)


def test_contradicting_labels_for_one_text_are_both_refused():
    chain = "One comes first. Two comes after that. Three is the last."
    reply = "[deduction] One comes first. [deduction] Two comes after that. [backtracking] Two comes after that. "
    reply += "[deduction] Three is the last."
    found = parse(reply, chain)
    assert [chain[s.start : s.end] for s in found.spans] == ["One comes first.", "Three is the last."]
    assert found.unplaced == 2


def test_a_jump_ahead_does_not_lose_what_lies_between():
    reply = render([("deduction", "I doubt that."), *TRUTH])  # the end, quoted at the beginning
    found = parse(reply, CHAIN)
    assert [s for s in found.spans if s.label != "uncertainty-estimation"] == EXPECTED[:-1]
    assert found.unplaced >= 1


def test_omissions_and_small_changes_are_mended_between_placed_neighbours():
    chain = "We begin here. The long middle part has many words that are dull to copy out again. That is the end."
    whole = Span("deduction", 15, chain.index(" That is"))
    for middle in (
        "The long middle part ... to copy out again.",
        "The long middle part has many words [...]",
        "The long middle part has mny words that are dull to copy out again.",
        "The long middle part has many words that are dull to copy out again. (Here it computes.)",
    ):
        found = parse(
            render([("initializing", "We begin here."), ("deduction", middle), ("backtracking", "That is the end.")]),
            chain,
        )
        assert found.spans[1] == whole, middle
        assert (found.mended, found.unplaced) == (1, 0)
    other = render(
        [
            ("initializing", "We begin here."),
            ("deduction", "Something else altogether."),
            ("deduction", "That is the end."),
        ]
    )
    assert parse(other, chain).unplaced == 1


def test_a_cut_reply_loses_its_last_stretch():
    reply = render(TRUTH)
    for cut in range(len(reply)):
        for told in (True, False):
            found = parse(reply[:cut], CHAIN, truncated=told)
            ends = reply[:cut].count('["end-section"]')
            if told or ends > 1:
                assert set(found.spans) <= set(EXPECTED)
                assert len(found.spans) >= ends - 2, cut
            assert len(found.spans) + found.unplaced == found.segments


def test_nothing_to_parse():
    for reply in ("", "   ", "no marks", "[deduction]", "][", "[" * 500, '["deduction"]' * 100, "\x00", "[\n]"):
        assert parse(reply, CHAIN).spans == ()
        assert parse(reply, "").spans == ()
    assert parse("[deduction] a", "").coverage == 0.0


def test_words_are_never_cut():
    assert parse("[deduction] The sum is 1", "The sum is 15 in all.").spans == ()
    assert parse("[deduction] The sum is 1", "The sum is 1.5 in all.").spans == ()
    assert parse("[deduction] sum is one here", "The checksum is one here.").spans == ()
    chain = "The sum is one. Next."
    assert parse("[deduction] The sum is one", chain).spans == (Span("deduction", 0, 15),)  # with its full stop


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["faithful", "repeated", "garbled", "brackets", "quotes", "one letter", "short"])
def test_time_on_long_chains(kind):
    rng = random.Random(0)
    words = ["sum", "wait", "so", "number", "[0, 1]", "\\[x\\]", "for", "then", "we", "a[i]", "42"]
    sentence = {
        "repeated": lambda: "Wait, no. ",
        "one letter": lambda: "a",
        "short": lambda: rng.choice("ABCDEFGHIJ") + " ",
    }
    make = sentence.get(kind, lambda: " ".join(rng.choices(words, k=12)).capitalize() + ". ")
    size = len(make()) if kind in sentence else 120
    parts = [make() if kind in sentence else make() + make() for _ in range(100_000 // size)]
    chain = "".join(parts)
    assert len(chain) > 90_000 or kind == "repeated"
    copies = [part[::-1] if kind == "garbled" and k % 3 else part for k, part in enumerate(parts)]
    reply = "".join(f'["{rng.choice(LABELS)}"]{copy}["end-section"]' for copy in copies[:20_000])
    reply = {"brackets": "[" * 100_000 + reply, "quotes": '["' * 50_000 + reply}.get(kind, reply)
    start = time.perf_counter()
    found = parse(reply, chain)
    assert time.perf_counter() - start < 10
    if kind == "faithful":
        assert found.unplaced == 0 and found.coverage == 1.0


# --- 1,000 fuzzed replies -----------------------------------------------------------------------------------------

OPENERS = ['["{}"]', "[{}]", "['{}']", "[“{}”]", "[2. {}]", '["3. {}"]', '**["{}"]**', "[ {} ]", '\\["{}"\\]', "[{}:]"]
CLOSERS = ['["end-section"]', "[end-section]", "[/end-section]", "[/{}]", '["/{}"]', "[end]", "[End Section]", ""]
SENTENCES = [
    "Wait, that is not right.",
    "Let x = [0, 1] and y = a[i] + b[4].",
    "So \\[ x^2 = {n} \\] holds.",
    "Then \\( f({n}) = {m} \\), as in [{n}].",
    "For example, take {n} and {m}.",
    "I remember that “{w}” means {v} — or nearly so.",
    "Hmm, is it {w}? I don't know...",
    "The {w} of {v} is {n}.{m}, not {m},{n}00.",
    "So the {w} is {n}.",
    "- the {w}: {n}",
    "**{w}** is a *{v}*.",
    "数列的{w}是{n}。",
    "Ça dépend du {w}, naïve as it is; ½ ≤ {n} ∈ ℕ 🙂.",
    "Is `{w}[{n}]` equal to `{v}`?",
    "$${n} \\times {m}$$ is large!",
    "Let me check [{w}] again: ({v}, {n}).",
    "Okay.",
    "No.",
]
WORDS = [
    "apple",
    "river",
    "prime",
    "matrix",
    "cube",
    "graph",
    "vertex",
    "digit",
    "carry",
    "balance",
    "mirror",
    "ladder",
]


def sentence(rng):
    text = rng.choice(SENTENCES)
    for key in "nm":
        text = text.replace("{" + key + "}", str(rng.randrange(1, 60)))
    return text.replace("{w}", rng.choice(WORDS)).replace("{v}", rng.choice(WORDS))


def truth(rng):
    """A chain and its segments (label, start, end), of which some have no label."""
    chain, segments = rng.choice(["", "\n", "  "]), []
    for _ in range(rng.randrange(1, 25)):
        text = rng.choice([" ", " ", "\n"]).join(sentence(rng) for _ in range(rng.choice([1, 1, 2, 3])))
        label = rng.choice(LABELS) if rng.random() < 0.93 else None
        segments.append((label, len(chain), len(chain) + len(text)))
        chain += text + rng.choice([" ", "\n\n", "\n", " \n"])
    return chain, segments


def soft(rng, text):
    """Changes that a parser must see through."""
    if rng.random() < 0.3:
        text = re.sub(r"\s+", lambda _: rng.choice([" ", "  ", "\n", "\t", "\u00a0"]), text)
    if rng.random() < 0.2:
        text = text.replace("“", '"').replace("”", '"').replace("'", "’")
    if rng.random() < 0.2:
        text = text.replace("—", rng.choice(["-", "–", "--"]))
    if rng.random() < 0.2:
        text = text.replace("\\[", "[").replace("\\]", "]").replace("\\(", "(").replace("\\)", ")")
    if rng.random() < 0.2:
        text = text.replace("...", "…")
    return text


PROSE = ["Here is the next part:", "I hope this helps!", "(continued)", "Note that I kept [3] as it is.", "Sure."]


def fuzz(rng, chain, segments, hard):
    """A reply, whether it says that it was cut, and the spans that it may give: position -> label."""
    style, ending = rng.choice(OPENERS), rng.choice(CLOSERS)
    mixed = rng.random() < 0.3
    pieces, refused = [], set()
    for k, (label, start, end) in enumerate(segments):
        text = soft(rng, chain[start:end])
        if label is None:
            if rng.random() < 0.5 and ending and not mixed:
                pieces.append(text)  # copied, but without marks
            continue
        if mixed:
            style, ending = rng.choice(OPENERS), rng.choice(CLOSERS[:-1])
        spelled = rng.choice([label, label, label.upper(), label.replace("-", " "), label.replace("-", "_")])
        if rng.random() < (0.15 if hard else 0.05):
            spelled = rng.choice(["summarizing", "final answer", "Verification", "deduction/backtracking", "deducing"])
            refused.add(k)
        if hard:
            text = damage(rng, text)
        opening, closing = style.format(spelled), ending.format(spelled)
        if not closing and segments[k + 1 : k + 2] and segments[k + 1][0] is None:
            closing = '["end-section"]'
        space = rng.choice([" ", "", "\n"])
        pieces.append(f"{opening}{space}{text}{space}{closing}")
    if ending and rng.random() < 0.3:
        pieces.insert(rng.randrange(len(pieces) + 1), rng.choice(PROSE))
    cut = False
    if hard:
        change = rng.random()
        if change < 0.15 and pieces:
            pieces.pop(rng.randrange(len(pieces)))
        elif change < 0.25 and pieces:
            pieces.insert(rng.randrange(len(pieces) + 1), rng.choice(pieces))
        elif change < 0.3:
            rng.shuffle(pieces)
        elif change < 0.35:
            pieces.insert(rng.randrange(len(pieces) + 1), '["deduction"] Words of no chain at all. ["end-section"]')
    reply = rng.choice(["\n", " ", "\n\n", ""]).join(pieces)
    if rng.random() < 0.2:
        reply = f"```\n{reply}\n```"
    if hard and rng.random() < 0.2:
        reply, cut = reply[: rng.randrange(len(reply) + 1)], True
    if hard and rng.random() < 0.2:
        for _ in range(rng.randrange(1, 6)):
            at = rng.randrange(len(reply) + 1)
            # A word of one letter is not taken away whole: what is left would be a true copy of less.
            gone = rng.random() < 0.5 and not any(c.isspace() for c in reply[max(0, at - 1) : at + 2])
            reply = reply[:at] + rng.choice(["", "[", "]", '"', " ", "[0, 1]", "\x00", "💥", "\\"]) + reply[at + gone :]
    return reply, cut, refused


def damage(rng, text):
    change = rng.random()
    words = text.split(" ")
    at = rng.randrange(len(words))
    if change < 0.05:
        words.insert(at, rng.choice(PROSE))
    elif change < 0.1:
        words[at] = words[at][::-1]
    elif change < 0.13 and len(words) > 4:
        words[1:-1] = ["..."]
    elif change < 0.16 and 0 < at < len(words) - 1 and words[0] != "-" and words[at] != words[at - 1]:
        words.pop(at)
    elif change < 0.18 and text[1].isalnum():  # not a whole word: then the copy would be a true one of less
        return text[1:]
    elif change < 0.2 and text[-2].isalnum():
        return text[:-1]
    return " ".join(words)


@pytest.mark.parametrize("hard", [False, True], ids=["harmless", "harmful"])
def test_fuzzed_annotations(hard, seeds=range(500)):
    whole = right = lost = 0
    for seed in seeds:
        rng = random.Random(f"{seed}/{hard}")
        chain, segments = truth(rng)
        reply, cut, refused = fuzz(rng, chain, segments, hard)
        found = parse(reply, chain, truncated=cut)
        expected = {(s, e): label for k, (label, s, e) in enumerate(segments) if label is not None and k not in refused}
        texts = {(label, "".join(chain[s:e].split())) for (s, e), label in expected.items()}
        # Sorted, apart, inside, with trimmed edges; what has no place is counted.
        edges = [0, *(x for span in found.spans for x in span[1:]), len(chain)]
        assert edges == sorted(edges), seed
        assert all(s.start < s.end and chain[s.start : s.end] == chain[s.start : s.end].strip() for s in found.spans), (
            seed
        )
        assert len(found.spans) + found.unplaced == found.segments, seed
        assert 0 <= found.coverage <= 1
        for label, start, end in found.spans:  # never a wrong span
            assert (label, "".join(chain[start:end].split())) in texts, (seed, label, chain[start:end], reply)
        whole += len(expected)
        right += sum(expected.get(span[1:]) == span.label for span in found.spans)
        lost += len(expected) - len(found.spans)
        if not hard:
            assert sum(found.unknown.values()) == len(refused), (seed, reply)
            missing = {chain[s:e]: k for (s, e), k in expected.items() if Span(k, s, e) not in found.spans}
            gaps = any(label is None for label, _, _ in segments)  # then repeated text may be ambiguous
            assert not [text for text in missing if not gaps or chain.count(text) == 1], (seed, missing, chain, reply)
    # Harmful changes may cost spans, but few.
    assert len(seeds) < 100 or right >= (0.7 if hard else 0.999) * whole, (right, lost, whole)
