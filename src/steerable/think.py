"""The think block: its tags, whether a template opens it, and where the tags stand in a sequence of tokens.

A tag is a text. Three kinds are followed exactly:

- one added token of the vocabulary (`<think>` of Qwen3 and the R1 distills), which every tokenizer cuts out first;
- several tokens, the outer ones added (`<|channel|>analysis<|message|>` of gpt-oss): that sequence of ids;
- ordinary text, where the vocabulary has no such tokens: the characters, however they are cut into tokens, so
  also where the last of them brings what follows the tag (`>` and a paragraph break in one) or the first
  brings what precedes it.

A tag stands where its *last* character does: the token that completes it. Which tokens of a running sequence
count as thinking is decided from left to right, as the model writes them, so the tokens of an unfinished
closing tag still do: nobody can know them for a tag. Texts of finished chains (`ThinkTags.split`) are cut at the
tag's first character.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .errors import UsageError

# What a tag begins, as a number: 0 is "no tag here".
BEFORE, THINKING, ANSWER = 1, 2, 3

#: Opening tag, closing tag, and, where the closing tag does not begin the answer by itself, the tag that does.
Texts = tuple[str, str] | tuple[str, str, str]

#: Tags of published reasoning models, tried in this order.
KNOWN: tuple[Texts, ...] = (
    ("<|channel|>analysis<|message|>", "<|end|>", "<|channel|>final<|message|>"),  # gpt-oss (harmony)
    ("<think>", "</think>"),  # DeepSeek-R1, Qwen3, QwQ, ...
    ("<|thinking|>", "<|/thinking|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),  # OpenThinker, Sky-T1
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A Reasoning
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("◁think▷", "◁/think▷"),  # Kimi
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
)


class Split(NamedTuple):
    """A chain cut at its tags; `thinking_tokens` counts those that hold neither tag."""

    thinking: str
    answer: str
    closed: bool
    thinking_tokens: int


@dataclass(frozen=True)
class ThinkTags:
    """Token ids of the tags; `opened_by_template`: the generation prompt already holds the opening tag.

    answer: ids of the tag that begins the answer, where it is not the closing tag that does. A closing tag then
    begins neither. texts: the tags as they are written. pieces: the symbols (characters, or one id) of every
    token that shares a character with a tag; None where tags are sequences of ids.
    """

    open: tuple[int, ...]
    close: tuple[int, ...]
    opened_by_template: bool = False
    answer: tuple[int, ...] = ()
    texts: Texts = ("<think>", "</think>")
    pieces: Mapping[int, Sequence[Hashable]] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.open or not self.close:
            raise UsageError("a think block needs an opening and a closing tag of one token at least")
        if self.open == self.close:
            raise UsageError("the opening and the closing tag of the think block are the same: expected two tags")

    @property
    def single(self) -> tuple[int, int] | None:
        """The ids of opening and closing tag where each is one token and nothing else marks the answer."""
        plain = self.pieces is None and not self.answer and len(self.open) == len(self.close) == 1
        return (self.open[0], self.close[0]) if plain else None

    @cached_property
    def matcher(self) -> Matcher:
        """What finds the tags in a running sequence."""
        after = BEFORE if self.answer else ANSWER
        tags = ((self.open, THINKING), (self.close, after), (self.answer, ANSWER))
        pieces = self.pieces if self.pieces is not None else {i: (i,) for tag, _ in tags for i in tag}
        return Matcher([(tuple(s for i in tag for s in pieces[i]), begins) for tag, begins in tags if tag], pieces)

    def opened(self, text: str) -> bool:
        """Whether a text ends inside the block: its last tag is the opening one."""
        return text.rfind(self.texts[0]) > text.rfind(self.texts[1])

    def before_thinking(self, prompt: str) -> str:
        """A prompt up to where the thinking begins: where the template leaves the block closed, the model
        opens it itself, so the opening tag is put back."""
        return prompt if self.opened(prompt) else prompt + self.texts[0]

    def written(self, prompt: str, chain: Mapping[str, Any]) -> str:
        """What the model wrote after a prompt, from a chain's record: its tags are put back."""
        thinking, answer, closed = chain["thinking"], chain["answer"], chain["closed"]
        opened = self.opened(prompt)
        if not (opened or closed or thinking):
            return str(answer)  # no block at all
        # harmony alone has a third tag, and begins another message for it
        third = "".join(f"<|start|>assistant{text}" for text in self.texts[2:] if answer)
        end = f"{self.texts[1]}{third}{answer}" if closed else ""
        return f"{'' if opened else self.texts[0]}{thinking}{end}"

    def find(self, ids: Sequence[int]) -> list[tuple[int, int]]:
        """Where tags are completed in a sequence of ids, and what each begins."""
        if not ids:
            return []
        row = torch.tensor([list(ids)])
        events, _ = self.matcher.advance(torch.zeros(1, dtype=torch.long), row, torch.ones_like(row).bool())
        return [(i, event) for i, event in enumerate(events[0].tolist()) if event]

    def split(self, tokenizer: Any, ids: Sequence[int]) -> Split:
        """Thinking and answer of what a model wrote after its prompt, without a stop token.

        The first block counts, and what precedes it belongs to neither. `thinking` is the text between the tags
        untouched, so that character offsets stay valid. Without a block everything is the answer; with a tag for
        the answer, what follows the last of these, up to the next closing tag.
        """
        marks = self.find(ids)
        start = next((i + 1 for i, event in marks if event == THINKING), None)
        if self.opened_by_template and start is not None:
            first = self._begin(tokenizer, ids, start - 1, self.texts[0])
            if _decode(tokenizer, ids[:first]).strip():
                start = None  # the model speaks of the tag inside the block that the template has opened
        lead = ""
        if start is None:
            if not self.opened_by_template:
                return Split("", self._answer(tokenizer, ids, marks, 0), False, 0)
            start = 0
        elif self.pieces is not None:
            lead = _after(tokenizer, ids[:start], self.texts[0])
        end = next((i for i, event in marks if i >= start and event != THINKING), None)
        stop = len(ids) if end is None else self._begin(tokenizer, ids, end, self.texts[1])
        text = lead + _between(tokenizer, ids, start, max(start, stop))
        if end is None:
            return Split(text, "", False, len(ids) - start)
        if self.pieces is not None:
            text += _decode(tokenizer, ids[stop : end + 1]).split(self.texts[1])[0] if stop >= start else ""
        return Split(text, self._answer(tokenizer, ids, marks, end + 1), True, max(0, stop - start))

    def _begin(self, tokenizer: Any, ids: Sequence[int], last: int, text: str) -> int:
        """The first token of the tag that the token `last` completes."""
        if self.pieces is None:
            return last + 1 - len(self.open if text == self.texts[0] else self.close)
        return next((i for i in range(last, -1, -1) if text in _decode(tokenizer, ids[i : last + 1])), 0)

    def _answer(self, tokenizer: Any, ids: Sequence[int], marks: list[tuple[int, int]], start: int) -> str:
        stop, lead = len(ids), ""
        if self.answer:
            begins = [i + 1 for i, event in marks if i >= start and event == ANSWER]
            if not begins and (start or marks):
                return ""
            start = begins[-1] if begins else 0
            stop = next((i for i, event in marks if i >= start), stop)
        elif self.pieces is not None and start:
            lead = _after(tokenizer, ids[:start], self.texts[1])
        rest = tokenizer.decode(ids[start:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return lead + str(rest)


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def _between(tokenizer: Any, ids: Sequence[int], start: int, stop: int) -> str:
    """The text of the tokens [start, stop) where they stand: decoded alone they may lose a space in front."""
    before, whole = _decode(tokenizer, ids[:start]), _decode(tokenizer, ids[:stop])
    return whole[len(before) :] if whole.startswith(before) else _decode(tokenizer, ids[start:stop])


def _after(tokenizer: Any, ids: Sequence[int], text: str) -> str:
    """What the last token brings after a tag that it completes."""
    return _decode(tokenizer, ids).rpartition(text)[2]


class Matcher:
    """A finite automaton over tokens that follows all tags at once (Aho and Corasick 1975, on symbols).

    tags: symbols of each, and what it begins. pieces: the symbols of every token that could take part in a
    tag; the others only interrupt one. Tags may overlap; where one token completes several, the last one counts,
    and the longer of two that end together.
    """

    def __init__(self, tags: Sequence[tuple[tuple[Hashable, ...], int]], pieces: Mapping[int, Sequence[Hashable]]):
        self._tags = sorted(tags, key=lambda tag: -len(tag[0]))
        prefixes = {tag[:n] for tag, _ in tags for n in range(len(tag))}
        self._words = sorted(prefixes, key=lambda word: (len(word), repr(word)))
        self._index = {word: i for i, word in enumerate(self._words)}
        self.reach = max(len(tag) for tag, _ in tags) - 1
        """Tokens before a token that its event may depend on: each has a symbol at least."""
        self.other = max(pieces, default=0) + 1
        self.table = self._fill(pieces)
        """[states, other + 1] int64: next state * 4 + event of the token."""
        self._on: dict[torch.device, Tensor] = {}

    def _step(self, word: tuple[Hashable, ...], symbol: Hashable) -> tuple[tuple[Hashable, ...], int]:
        word = (*word, symbol)
        event = next((begins for tag, begins in self._tags if word[-len(tag) :] == tag), 0)
        while word not in self._index:
            word = word[1:]
        return word, event

    def _run(self, word: tuple[Hashable, ...], symbols: Sequence[Hashable]) -> int:
        last = 0
        for symbol in symbols:
            word, event = self._step(word, symbol)
            last = event or last
        return self._index[word] * 4 + last

    def _fill(self, pieces: Mapping[int, Sequence[Hashable]]) -> Tensor:
        table = torch.zeros(len(self._words), self.other + 1, dtype=torch.long)
        firsts = {tag[0] for tag, _ in self._tags}
        by_first = defaultdict(list)
        for token, symbols in pieces.items():
            by_first[symbols[0]].append(token)
            if not firsts.isdisjoint(symbols):
                table[:, token] = self._run((), symbols)
        alphabet = {symbol for tag, _ in self._tags for symbol in tag}
        for word in self._words[1:]:
            for symbol in alphabet:
                if self._step(word, symbol) != self._step((), symbol):
                    for token in by_first[symbol]:
                        table[self._index[word], token] = self._run(word, pieces[token])
        return table

    def advance(self, state: Tensor, ids: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Events [B, T] (0: none) of the tokens ids [B, T] and the states [B] behind them; padding, where
        `valid` is False, is passed over."""
        table = self._on.setdefault(ids.device, self.table.to(ids.device))
        tokens = ids.clamp(max=self.other)
        length = ids.shape[1]
        if length == 1:
            value = torch.where(valid[:, 0], table[state, tokens[:, 0]], state * 4)
            return (value & 3)[:, None], value >> 2
        rank = valid.cumsum(1) - 1
        packed = torch.full((len(ids), length + 1), self.other, dtype=torch.long, device=ids.device)
        packed.scatter_(1, torch.where(valid, rank, length), tokens)
        column = torch.arange(length, device=ids.device)
        # Every column at once: what lies further back than `reach` tokens has no say.
        value = (state * 4)[:, None].expand(-1, length)
        for back in range(self.reach, -1, -1):
            fed = table[value >> 2, packed[:, (column - back).clamp(min=0)]]
            value = torch.where(column >= back, fed, value)
        count = valid.sum(1)
        behind = (value >> 2).gather(1, (count - 1).clamp(min=0)[:, None])[:, 0]
        events = torch.where(valid, (value & 3).gather(1, rank.clamp(min=0)), 0)
        return events, torch.where(count > 0, behind, state)


_found: WeakKeyDictionary[Any, tuple[Any, ThinkTags]] = WeakKeyDictionary()


def set_think_tags(tokenizer: Any, texts: Texts) -> None:
    """Say what the tags are, where `think_tags` would not find them or finds others. Kept in the tokenizer's
    own config (key "think"), so that it is saved with it."""
    if not 2 <= len(texts) <= 3 or not all(isinstance(text, str) and text for text in texts):
        raise UsageError(f"think tags are {texts!r}: expected two texts, e.g. '<think>' and '</think>'")
    tokenizer.init_kwargs["think"] = list(texts)


def think_tags(tokenizer: Any, texts: Texts | None = None) -> ThinkTags:
    """The tags of the model's think block.

    texts: None takes what `set_think_tags` or the tokenizer's config says ("think"), else the first of `KNOWN`
    whose tags the vocabulary holds, else the first of which the chat template writes one.
    Raises UsageError where there is none.
    """
    own = getattr(tokenizer, "init_kwargs", {}).get("think")
    texts = texts or (tuple(own) if own else None)
    key = (texts, getattr(tokenizer, "chat_template", None))
    if (known := _found.get(tokenizer)) is not None and known[0] == key:
        return known[1]
    vocabulary = tokenizer.get_vocab()
    texts = texts or _detect(tokenizer, vocabulary)
    # two tags of a known three may be named alone
    texts = next((known for known in KNOWN if known[:2] == tuple(texts)), texts)
    tags = _encode(tokenizer, vocabulary, texts)
    _found[tokenizer] = (key, tags)
    return tags


def think_tags_if_any(tokenizer: Any) -> ThinkTags | None:
    """The tags of the model's think block; None for a model that writes none, such as a base model."""
    try:
        return think_tags(tokenizer)
    except UsageError:
        return None


def _detect(tokenizer: Any, vocabulary: Mapping[str, int]) -> Texts:
    added = _added(tokenizer)
    for texts in KNOWN:
        if all(text in vocabulary for text in texts):
            return texts
        if added and all(_special(tokenizer, text, added) for text in texts):
            return texts
    template = str(getattr(tokenizer, "chat_template", None) or "")
    for texts in KNOWN[1:]:
        if texts[0] in template or texts[1] in template:  # one that opens the block need not close it
            return texts
    raise UsageError(
        f"{tokenizer.name_or_path or 'this model'!r} has no think block: expected <think> and </think> or other "
        'known tags in its vocabulary or its chat template; choose a reasoning model, or name the tags as "think" '
        "in its tokenizer_config.json"
    )


def _added(tokenizer: Any) -> dict[str, int]:
    """Tokens that are matched in the text before it is cut: special ones among them."""
    return dict(getattr(tokenizer, "added_tokens_encoder", None) or {})


def _special(tokenizer: Any, text: str, added: Mapping[str, int]) -> bool:
    """Whether the tag is several tokens of which the outer ones are special."""
    if not any(text.startswith(token) for token in added if token):
        return False
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    marks = set(added.values())
    return bool(ids) and ids[0] in marks and ids[-1] in marks


def _encode(tokenizer: Any, vocabulary: Mapping[str, int], texts: Texts) -> ThinkTags:
    added = _added(tokenizer)

    def ids(text: str) -> tuple[int, ...]:
        if text in added:
            return (added[text],)
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    found = [ids(text) for text in texts]
    exact = all(text in added or _special(tokenizer, text, added) for text in texts)
    pieces = None if exact else _pieces(tokenizer, vocabulary, found, added)
    opening, closing, *answer = found
    tags = ThinkTags(opening, closing, False, answer[0] if answer else (), texts, pieces)
    return ThinkTags(opening, closing, _opened_by_template(tokenizer, tags), tags.answer, texts, pieces)


def _pieces(
    tokenizer: Any, vocabulary: Mapping[str, int], tags: Sequence[tuple[int, ...]], added: Mapping[str, int]
) -> dict[int, Sequence[Hashable]]:
    """The symbols of the tokens that hold a character of a tag: a special token is a symbol by itself.

    The vocabulary's own spelling is compared, in which the space that some tokenizers put before a text is left
    out of the tag.
    """
    special = set(added.values())
    spelled: dict[int, Sequence[Hashable]] = {}
    for tag in tags:
        for place, token in enumerate(tag):
            word = str(tokenizer.convert_ids_to_tokens(token))
            spelled[token] = (token,) if token in special else word.lstrip("▁Ġ") if place == 0 else word
    alphabet = {symbol for symbols in spelled.values() for symbol in symbols}
    for word, token in vocabulary.items():
        if token in special:
            spelled[token] = (token,)
        elif word and not alphabet.isdisjoint(word):
            spelled[token] = word
    return spelled


def _opened_by_template(tokenizer: Any, tags: ThinkTags) -> bool:
    if not getattr(tokenizer, "chat_template", None):
        return False
    return tags.opened(render(tokenizer, "?"))


def render(tokenizer: Any, prompt: str, thinking: bool = True, system: str = "") -> str:
    """A user's message in the chat template, up to where the model begins to speak. No system message is sent unless
    one is given, since some templates refuse it. thinking: what templates with a switch for it (`enable_thinking`,
    `thinking`) are told; the others take no notice.

    Raises UsageError for a tokenizer without a chat template, and for a template that does not take the message.
    """
    from jinja2 import TemplateError

    name = tokenizer.name_or_path or "this model"
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError(
            f"{name!r} has no chat template: choose a model with one, or, where the command has it, give --template, a "
            "text with {prompt}"
        )
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    switches = {"enable_thinking": thinking, "thinking": thinking}
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **switches)
    except TemplateError as error:
        what = "a system message" if system else "a user's message"
        raise UsageError(f"the chat template of {name!r} refuses {what} ({error}): mend it") from error
    return str(text)
