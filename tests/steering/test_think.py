"""Think tags of every kind against loops over text, in pieces, in batches, under padding."""

import random
import re
from dataclasses import replace
from functools import cache
from os.path import commonprefix

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from vocabularies import REAL, real

from steerable.chains.generation import prompt_ids, prompt_text, split_chain
from steerable.chains.windows import align_chain
from steerable.engines.base import Completion
from steerable.steering.think import ANSWER, BEFORE, THINKING, ThinkTags, render, set_think_tags, think_tags
from steerable.steering.tokens import SequenceState
from steerable.store.errors import UsageError

HARMONY = ("<|channel|>analysis<|message|>", "<|end|>", "<|channel|>final<|message|>")
WORDS = "so what is it then? wait, no; 12 + 3 = 15. hmm <b> a</b> </thin <thinker> ok.\n\n yes\n"


def byte_level(special=(), template=None, seed=0, size=420):
    """A byte-level tokenizer whose merges run across the edges of tags."""
    rng = random.Random(seed)
    words = [*WORDS.split(" "), "think", ">\n\n", ".</", "k>\n", "k>b", "a</t", "\n<", "final", "</", "analysis"]
    corpus = [" ".join(rng.choices(words, k=12)) for _ in range(80)]
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet))
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=template)


OPENS = "{{ messages[0].content }}|{% if add_generation_prompt %}<think>\n{% endif %}"
SPLITS = "{{ messages[0].content.split('</think>')[-1].split('<think>')[-1] }}|"
QWEN = (
    "{{ messages[0].content }}|{% if add_generation_prompt %}"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
DEEPSEEK = "{{ messages[0].content }}|{% if thinking %}<think>{% else %}</think>{% endif %}"
GPT_OSS = (
    "<|start|>system<|message|>Hi<|end|><|start|>user<|message|>{{ messages[0].content }}<|end|><|start|>assistant"
)
SPECIAL = ("<|channel|>", "<|message|>", "<|end|>", "<|start|>", "<|return|>")


@pytest.fixture(scope="module")
def spelled():
    """`<think>` is ordinary text, which the template opens."""
    return byte_level(template=OPENS)


@pytest.fixture(scope="module")
def harmony():
    return byte_level(SPECIAL, GPT_OSS)


def oracle(pieces, tags):
    """Phase and event of every piece: what the tag begins that ends last in the text so far. tags: (text, begins)."""
    result, phase, text = [], BEFORE, ""
    for piece in pieces:
        before, text = len(text), text + piece
        ends = [
            (end, len(tag), begins) for tag, begins in tags for end in range(len(text) + 1) if text[:end].endswith(tag)
        ]
        new = [found for found in ends if found[0] > before]
        phase = max(new)[2] if new else phase
        result.append((phase, bool(new)))
    return result


def check(tokens, row, column, expected):
    phase, is_tag = expected
    assert bool(tokens.thinking[row, column]) == (phase == THINKING and not is_tag)
    assert bool(tokens.answer[row, column]) == (phase == ANSWER and not is_tag)


def run(tags, rows, expected, seed):
    """Feed rows of ids in chunks, with padding anywhere, rows changing places, and compare with `expected`."""
    rng = random.Random(seed)
    state = SequenceState(tags)
    state.start(len(rows))
    order, fed = list(range(len(rows))), [0] * len(rows)
    while any(fed[i] < len(rows[i]) for i in order):
        width = rng.choice([1, 1, 2, 5, 30])
        ids = torch.full((len(order), width), rng.choice([0, 5]))
        valid = torch.zeros(len(order), width, dtype=torch.bool)
        fields = []
        for line, i in enumerate(order):
            for column in range(width):
                if fed[i] < len(rows[i]) and rng.random() < 0.8:
                    ids[line, column], valid[line, column] = rows[i][fed[i]], True
                    fields.append((line, column, expected[i][fed[i]]))
                    fed[i] += 1
        tokens = state.advance(ids, valid)
        for line, column, wanted in fields:
            check(tokens, line, column, wanted)
        assert not (tokens.thinking | tokens.answer)[~valid].any()
        if rng.random() < 0.3:  # rows change places
            places = list(range(len(order)))
            rng.shuffle(places)
            state.select(torch.tensor(places))
            order = [order[place] for place in places]
    whole = SequenceState(tags)
    for i, row in enumerate(rows):
        whole.start(1)
        tokens = whole.advance(torch.tensor([row]))
        for column in range(len(row)):
            check(tokens, 0, column, expected[i][column])


@pytest.mark.parametrize("seed", range(25))
def test_sequences_of_ids(seed):
    """Tags of one to four ids that overlap and contain one another; ids as letters make the texts of the oracle."""
    rng = random.Random(seed)
    while True:
        opening, closing, answer = (tuple(rng.choices([1, 2, 3], k=rng.randrange(1, 5))) for _ in range(3))
        if len({opening, closing, answer}) == 3:
            break
    three = seed % 2
    tags = ThinkTags(opening, closing, False, answer if three else ())
    texts = [(opening, THINKING), (closing, BEFORE if three else ANSWER), *([(answer, ANSWER)] if three else [])]
    rows = [rng.choices([1, 2, 3, 4, 9999], k=rng.randrange(1, 40)) for _ in range(4)]
    expected = [oracle([chr(i) for i in row], [("".join(map(chr, t)), b) for t, b in texts]) for row in rows]
    run(tags, rows, expected, seed)


@pytest.mark.parametrize("seed", range(25))
def test_text_however_it_is_cut(spelled, seed):
    """Random tokens, so that tags are cut and merged in all ways, and texts as the tokenizer cuts them."""
    rng = random.Random(seed)
    tags = think_tags(spelled)
    assert tags.pieces is not None and tags.single is None
    vocabulary = spelled.get_vocab()
    useful = [i for word, i in vocabulary.items() if set("<>/thinkĊ") & set(word)]
    parts = ["<think>", "</think>", "<", "</", "think", ">", ">\n\n", "<think", "k>", "</thi", "a", "é"]
    rows = [rng.choices(useful, k=rng.randrange(1, 40)) for _ in range(2)]
    rows += [spelled("".join(rng.choices(parts, k=rng.randrange(1, 25))))["input_ids"] for _ in range(3)]
    pieces = [[spelled.decode([i]) for i in row] for row in rows]
    expected = [oracle(row, [("<think>", THINKING), ("</think>", ANSWER)]) for row in pieces]
    run(tags, rows, expected, seed)


def test_tokens_merge_with_what_surrounds_a_tag(spelled):
    """The case that sequences of ids would miss."""
    alone, inside = (spelled(text)["input_ids"] for text in ("</think>", "a.</think>\n\nb"))
    assert not any(inside[i : i + len(alone)] == alone for i in range(len(inside)))
    assert [kind for _, kind in think_tags(spelled).find(inside)] == [ANSWER]


@pytest.mark.parametrize("seed", range(10))
def test_harmony_channels(harmony, seed):
    rng = random.Random(seed)
    tags = think_tags(harmony)
    assert tags.texts == HARMONY and tags.pieces is None and len(tags.answer) > 2
    parts = ["<|channel|>", "analysis", "final", "commentary", "<|message|>", "<|end|>", "<|start|>", "assistant", "so"]
    parts += [HARMONY[0], HARMONY[2]] * 2
    rows = [harmony("".join(rng.choices(parts, k=rng.randrange(1, 20))))["input_ids"] for _ in range(4)]
    pieces = [[harmony.decode([i]) for i in row] for row in rows]
    tags_of_text = list(zip(HARMONY, (THINKING, BEFORE, ANSWER), strict=True))
    expected = [oracle(row, tags_of_text) for row in pieces]
    run(tags, rows, expected, seed)


def test_a_conversation_in_harmony(harmony):
    """Messages of others end with the closing tag too, and are no answer; nor are earlier turns' what is asked."""
    turn = "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>final<|message|>No"
    text = prompt_text(harmony, "what") + turn + "<|end|><|start|>user<|message|>so<|end|><|start|>assistant" + turn
    ids = harmony(text)["input_ids"]
    state = SequenceState(think_tags(harmony))
    state.start(1)
    tokens = state.advance(torch.tensor([ids]))
    assert harmony.decode([i for i, on in zip(ids, tokens.thinking[0], strict=True) if on]) == "HmHm"
    assert harmony.decode([i for i, on in zip(ids, tokens.answer[0], strict=True) if on]) == "NoNo"


@pytest.mark.parametrize("finished", [True, False])
def test_split_harmony(harmony, finished):
    tags, end = think_tags(harmony), "<|return|>" if finished else ""
    head, final = "<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"

    def split(text):
        return split_chain(harmony, tags, Completion(harmony(text)["input_ids"], finished))

    said = split(f"{head}wait, no{final}12 + 3{end}")
    assert (said["thinking"], said["answer"], said["closed"]) == ("wait, no", "12 + 3", True)
    assert said["thinking_tokens"] == len(harmony("wait, no")["input_ids"])
    assert split(f"{final[7:]}12{end}")["answer"] == "12"  # the final channel alone
    cut = split(f"{head}wait{end}")
    assert (cut["thinking"], cut["answer"], cut["closed"]) == ("wait", "", False)
    ended = split(f"{head}wait<|end|><|start|>assi{end}")
    assert (ended["thinking"], ended["answer"], ended["closed"]) == ("wait", "", True)


@pytest.mark.parametrize(
    ("kind", "chain", "text"),
    [
        ("spelled", ("so", "15", True), "so</think>15"),
        ("spelled", ("so", "", False), "so"),
        ("harmony", ("so", "15", True), f"{HARMONY[0]}so<|end|><|start|>assistant{HARMONY[2]}15"),
        ("harmony", ("so", "", True), f"{HARMONY[0]}so<|end|>"),
        ("harmony", ("so", "", False), f"{HARMONY[0]}so"),
        ("harmony", ("", "15", False), "15"),
    ],
)
def test_what_was_written(kind, chain, text, request):
    tokenizer = request.getfixturevalue(kind)
    tags = think_tags(tokenizer)
    record = dict(zip(("thinking", "answer", "closed"), chain, strict=True))
    assert tags.written(prompt_text(tokenizer, "what"), record) == text
    said = split_chain(tokenizer, tags, Completion(tokenizer(text)["input_ids"], False))
    assert {key: said[key] for key in record} == record


@pytest.mark.parametrize("template", [OPENS, SPLITS])
@pytest.mark.parametrize("seed", range(12))
def test_split_equals_the_text_between_the_tags(template, seed):
    rng = random.Random(seed)
    tokenizer = byte_level(template=template)
    tags = think_tags(tokenizer)
    assert tags.opened_by_template == (template == OPENS)
    parts = [*WORDS.split(" "), "\n\n", " ", "é"]
    lead = rng.choice(["", "<think>"]) if tags.opened_by_template else rng.choice(["", "so ", "\n"]) + "<think>"
    thinking, answer = ("".join(rng.choices(parts, k=rng.randrange(9))) for _ in range(2))
    closed = rng.random() < 0.8
    text = lead + thinking + (f"</think>{answer}" if closed else "")
    ids = tokenizer(text)["input_ids"]
    said = split_chain(tokenizer, tags, Completion(ids, False))
    assert said["thinking"] == thinking
    assert said["answer"] == (answer if closed else "")
    assert said["closed"] == closed
    assert 0 <= said["thinking_tokens"] <= len(ids)


def test_a_tag_that_the_model_speaks_of_inside_the_block(tokenizer):
    """The template has opened the block: only a tag at its very beginning is the model's own."""
    tags = ThinkTags((1,), (2,), opened_by_template=True)
    inside = split_chain(tokenizer, tags, Completion([10, 1, 11, 2, 12], False))
    assert inside["thinking"] == tokenizer.decode([10, 1, 11]) and inside["thinking_tokens"] == 3
    again = split_chain(tokenizer, tags, Completion([1, 10, 11, 2, 12], False))
    assert again["thinking"] == tokenizer.decode([10, 11])


@pytest.mark.parametrize("kind", ["spelled", "harmony"])
def test_spans_stay_where_they_are(kind, request):
    tokenizer = request.getfixturevalue(kind)
    tags, prompt = think_tags(tokenizer), prompt_text(tokenizer, "what is 12 + 3?")
    thinking = "\nso 12 + 3 = 15.\n\nwait, <b> no; é hmm"
    chain = {"task_id": "t", "sample": 0, "thinking": thinking}
    spans = [
        {"label": "a", "start": thinking.index(text), "end": thinking.index(text) + len(text)}
        for text in ("so 12", "wait", "hmm")
    ]
    aligned = align_chain(tokenizer, prompt, chain, spans)
    head = tags.before_thinking(prompt)
    assert head.endswith(tags.texts[0] if kind == "harmony" else "<think>\n")
    assert (head + thinking).startswith(tokenizer.decode(aligned.ids))
    assert len(aligned.spans) == 3 and aligned.dropped == 0
    for span, text in zip(aligned.spans, ("so 12", "wait", "hmm"), strict=True):
        assert text in tokenizer.decode(aligned.ids[span.start : span.end])


@pytest.mark.parametrize(
    ("template", "special", "thinking", "ends", "opened"),
    [
        (OPENS, (), True, "<think>\n", True),
        (OPENS, ("<think>", "</think>"), True, "<think>\n", True),
        (QWEN, ("<think>", "</think>"), True, "|", False),
        (QWEN, ("<think>", "</think>"), False, "</think>\n\n", False),
        (DEEPSEEK, ("<think>", "</think>"), True, "<think>", True),
        (DEEPSEEK, ("<think>", "</think>"), False, "</think>", False),
        (SPLITS, (), True, "|", False),
        (GPT_OSS, SPECIAL, True, "<|start|>assistant", False),
    ],
)
def test_templates(template, special, thinking, ends, opened):
    tokenizer = byte_level(special, template)
    tags = think_tags(tokenizer)
    text = render(tokenizer, "what", thinking)
    assert text.endswith(ends) and tags.opened(text) == opened
    assert tags.opened_by_template == tags.opened(render(tokenizer, "?"))
    state = SequenceState(tags)
    state.start(1)
    state.advance(torch.tensor([prompt_ids(tokenizer, "what", thinking)]))
    tokens = state.advance(torch.tensor([tokenizer("so")["input_ids"]]))
    assert bool(tokens.thinking[0, 0]) == opened
    assert bool(tokens.answer[0, 0]) == ("</think>" in text)


def test_no_beginning_twice():
    """The template writes the first token, and the tokenizer would write it again."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_level(("<s>", "<think>", "</think>"), "<s>" + OPENS)
    first = tokenizer.convert_tokens_to_ids("<s>")
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", first)])
    assert tokenizer("a")["input_ids"][0] == first
    assert prompt_ids(tokenizer, "what").count(first) == 1


def test_a_template_that_refuses():
    tokenizer = byte_level(("<think>", "</think>"), "{{ raise_exception('no users here') }}")
    with pytest.raises(UsageError, match="refuses user messages .no users here"):
        render(tokenizer, "what")
    with pytest.raises(UsageError, match="has no chat template"):
        render(byte_level(), "what")


def test_one_token_each(tokenizer):
    assert think_tags(tokenizer) == ThinkTags((1,), (2,), opened_by_template=True)
    assert think_tags(tokenizer) is think_tags(tokenizer)


@pytest.mark.parametrize(
    "pair", [("<|thinking|>", "<|/thinking|>"), ("[THINK]", "[/THINK]"), ("<reasoning>", "</reasoning>")]
)
def test_other_known_tags(pair):
    tags = think_tags(byte_level(pair, "{{ messages[0].content }}"))
    assert tags.texts == pair and tags.single is not None
    spelled = byte_level(template="{{ messages[0].content }}" + "".join(pair))
    assert think_tags(spelled).texts == pair and think_tags(spelled).pieces is not None


def test_tags_may_be_said(spelled, tmp_path):
    own = byte_level(template=OPENS)
    assert think_tags(own, ("<b>", "</b>")).texts == ("<b>", "</b>")
    assert think_tags(own).texts == ("<think>", "</think>")
    set_think_tags(own, ("<b>", "</b>"))
    assert think_tags(own).texts == ("<b>", "</b>") and not think_tags(own).opened_by_template
    own.save_pretrained(tmp_path)
    assert think_tags(PreTrainedTokenizerFast.from_pretrained(tmp_path)).texts == ("<b>", "</b>")
    with pytest.raises(UsageError, match="expected two texts"):
        set_think_tags(own, ("<b>",))
    with pytest.raises(UsageError, match="are the same"):
        think_tags(own, ("<b>", "<b>"))


def test_no_think_block():
    class Without:
        name_or_path = "plain"

        def get_vocab(self):
            return {"<think>": 0}

    with pytest.raises(UsageError, match="'plain' has no think block"):
        think_tags(Without())
    with pytest.raises(UsageError, match="has no think block"):
        think_tags(byte_level(template="{{ messages[0].content }}"))


# Real vocabularies, in which <think> is ordinary text in most, and every way of writing a block.

KIMI = ("◁think▷", "◁/think▷")
WRITTEN = {  # what a model writes behind a prompt that leaves the block closed: "A" and "B" are its tags
    "plain": "Ahm 12 is it.Bso 等 é",
    "newlines": "A\nhm\n\nwait 一下\nB\n\nso 12",
    "space before": "so A hm B so",
    "no space": "soAhmBso.",
    "punctuation": "(A.hm).B.so!",
    "empty": "A\n\nB\n\nso",
    "nothing inside": "ABso",
    "closed twice": "AhmBso Bno",
    "opened twice": "Ahm A noBso",
    "unfinished tag inside": "Ahm </thin <thinker> ◁thin◁/ noBso",
    "cut off": "Ahm 等",
    "no block": "so 12\n\nis it",
    "bytes at the edges": "é等Aé等🙂B🙂等é",
}
PROMPTS = [  # what stands before
    "",
    "Q: what?\nA\n",  # a template that opens the block
    "Q: what? A",
    "Q: what?\nA\n\nB\n\n",  # one that closes it
    "Q: what?\nAhm.\n\nBso 12.\nQ: and?\n",  # an earlier turn
    "Q: what?\nAhm.\n\nBso 12.\nQ: and?\nA\n",
    "Q: why do you write A before B?\n",  # tags in the question
    "Q: why B after A, say?\nA\n",
]


tags_of = cache(think_tags)  # the whole vocabulary is read for them


def offsets(tokenizer, ids):
    """The characters [start, end) of the decoded text that each token has a byte of."""
    whole = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    reached, touched = [0], []
    for stop in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:stop], clean_up_tokenization_spaces=False)
        reached.append(max(reached[-1], len(commonprefix([text, whole]))))  # it may end within a character
        touched.append((reached[-2], reached[-1] + text.endswith("\ufffd")))
    return touched


def by_characters(tokenizer, ids, pair):
    """What each token is, by the decoded text: "tag" for those that complete one, else the phase."""
    text, phase, result = tokenizer.decode(ids, clean_up_tokenization_spaces=False), "", []
    ends = {m.end() - 1: m[0] == pair[0] for m in re.finditer("|".join(map(re.escape, pair)), text)}
    ranges = offsets(tokenizer, ids)
    for i, (start, end) in enumerate(ranges):
        # a character of several tokens is completed by the last of them
        done = end if i + 1 == len(ranges) else min(end, ranges[i + 1][0])
        completed = [ends[c] for c in range(start, done) if c in ends]
        phase = ("thinking" if completed[-1] else "answer") if completed else phase
        result.append("tag" if completed else phase)
    return result


def by_state(tags, rows, chunk, pad=0):
    """The same by the gates, the rows fed together in chunks behind padding on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    valid = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])
    state = SequenceState(tags)
    state.start(len(rows))
    parts = [state.advance(ids[:, i : i + chunk], valid[:, i : i + chunk]) for i in range(0, width, chunk)]
    thinking, answer = (torch.cat([getattr(part, name) for part in parts], 1) for name in ("thinking", "answer"))
    return [
        ["thinking" if t else "answer" if a else "" for t, a in zip(*line, strict=True)][width - len(row) :]
        for row, line in zip(rows, zip(thinking.tolist(), answer.tolist(), strict=True), strict=True)
    ]


@pytest.mark.parametrize("pair", [("<think>", "</think>"), KIMI])
@pytest.mark.parametrize("name", REAL)
def test_gates_in_real_vocabularies(name, pair, request):
    tokenizer = real(request, name)
    tags = tags_of(tokenizer, pair)
    texts = [
        (prompt + written).replace("A", pair[0]).replace("B", pair[1])
        for prompt in PROMPTS
        for written in WRITTEN.values()
    ]
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    expected = [by_characters(tokenizer, row, pair) for row in rows]
    assert sum(row.count("thinking") for row in expected) > 100 < sum(row.count("answer") for row in expected)
    expected = [["" if what == "tag" else what for what in row] for row in expected]
    for chunk in (1, 7, 10_000):
        assert by_state(tags, rows, chunk) == expected


@pytest.mark.parametrize("pair", [("<think>", "</think>"), KIMI])
@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("name", REAL)
def test_split_in_real_vocabularies(name, pair, opened, request):
    """Thinking, answer and closed are those of the text; the tokens inside hold no character of a tag."""
    tokenizer = real(request, name)
    tags = replace(tags_of(tokenizer, pair), opened_by_template=opened)
    for case, written in WRITTEN.items():
        if opened:
            written = written.partition("A")[2] if written.startswith("A") else written
        text = written.replace("A", pair[0]).replace("B", pair[1])
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text  # else the case says nothing
        before, tag, rest = text.partition(pair[0])
        if opened and (before.strip() or not tag):  # the block was open already: a tag inside is spoken of
            before, tag, rest = "", "", text
        thinking, closing, answer = rest.partition(pair[1]) if opened or tag else ("", "", text)
        answer = answer if closing or not (opened or tag) else ""
        if name == "qwen3.6" and pair != KIMI:  # special tokens, which an answer is told without
            answer = answer.replace(pair[1], "")
        first = len(before + tag)
        last = first + len(thinking)
        inside = sum(first <= start and end <= last for start, end in offsets(tokenizer, ids)) if opened or tag else 0
        split = tags.split(tokenizer, ids)
        assert (split.thinking, split.answer, split.closed) == (thinking, answer, bool(closing)), case
        assert split.thinking_tokens == inside, case


@pytest.mark.parametrize("name", REAL)
def test_random_pieces_of_tags_in_real_vocabularies(name, request):
    """Tokens that share characters with a tag, in any order: a model may write what no tokenizer would."""
    tokenizer, rng = real(request, name), random.Random(name)
    pair = ("<think>", "</think>")
    tags = tags_of(tokenizer, pair)
    texts = {i: tokenizer.decode([i]) for i in tokenizer.get_vocab().values()}
    texts = {i: text for i, text in texts.items() if "\ufffd" not in text}
    useful = [i for i, text in texts.items() if re.search(r"[</>]", text) or text in ("th", "ink", "think", "t")]
    pieces = [i for tag in pair for i in tokenizer(tag, add_special_tokens=False)["input_ids"]]
    rows = [[i for _ in range(8) for i in rng.choice([rng.sample(useful, 2), pieces])] for _ in range(8)]
    expected = [["" if w == "tag" else w for w in by_characters(tokenizer, row, pair)] for row in rows]
    for chunk in (1, 5, 10_000):
        assert by_state(tags, rows, chunk) == expected


def test_a_space_of_its_own():
    """Tokenizers of SentencePiece may spell the space before a text as a token."""
    words = ["<unk>", "▁", "<", "/", "think", ">", "hm", "so", "\n"]
    inner = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>"))
    inner = Tokenizer(models.Unigram([(word, -float(i)) for i, word in enumerate(words)], unk_id=0))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=OPENS)
    ids = tokenizer("<think>hm</think>so")["input_ids"]
    assert ids[0] == 1
    tags = think_tags(tokenizer)
    assert tags.opened_by_template
    assert tags.split(tokenizer, ids) == ("hm", "so", True, 1)
    assert by_state(tags, [ids], 1) == [["" if w == "tag" else w for w in by_characters(tokenizer, ids, tags.texts)]]


@pytest.mark.parametrize("texts", ["<think>", "ab", ("<think>",), ("", "b"), (1, 2)])
def test_tags_are_two_texts(spelled, texts):
    for function in (think_tags, set_think_tags):
        with pytest.raises(UsageError, match="expected two texts"):
            function(spelled, texts)
