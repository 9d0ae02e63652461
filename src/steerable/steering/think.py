"""The think block: its tags, whether a template opens it, and where the tags stand in a sequence of tokens.

A tag is a text. Three kinds are followed exactly:

- one added token of the vocabulary (`<think>` of Qwen3 and the R1 distills), which every tokenizer cuts out first;
- several tokens, the outer ones added (`<|channel|>analysis<|message|>` of gpt-oss): that sequence of ids;
- ordinary text, where the vocabulary has no such tokens: its bytes, however they are cut into tokens, so
  also where the last of them brings what follows the tag (`>` and a paragraph break in one) or the first
  brings what precedes it.

A tag stands where its *last* character does: the token that completes it. Which tokens of a running sequence
count as thinking is decided from left to right, as the model writes them, so the tokens of an unfinished
closing tag still do: nobody can know them for a tag. Texts of finished chains (`ThinkTags.split`) are cut at the
tag's first character.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from steerable.steering.automaton import Matcher
from steerable.steering.vocabulary import added_tokens, latin, spellings
from steerable.store.errors import UsageError

# What a tag begins, as a number: 0 is "no tag here".
BEFORE, THINKING, ANSWER = 1, 2, 3

Symbols = Sequence[Hashable]

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
    begins neither. texts: the tags as they are written. symbols: of each, the bytes of its text, and ids for special
    tokens; pieces: the same of every token that shares one with a tag. None where tags are sequences of ids.
    """

    open: tuple[int, ...]
    close: tuple[int, ...]
    opened_by_template: bool = False
    answer: tuple[int, ...] = ()
    texts: Texts = ("<think>", "</think>")
    symbols: Sequence[Symbols] | None = field(default=None, compare=False, repr=False)
    pieces: Mapping[int, Symbols] | None = field(default=None, compare=False, repr=False)

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
        events = (THINKING, BEFORE if self.answer else ANSWER, ANSWER)
        if self.symbols is None or self.pieces is None:
            tags = list(zip((self.open, self.close, self.answer), events, strict=True))
            return Matcher([(tag, event) for tag, event in tags if tag], {i: (i,) for tag, _ in tags for i in tag})
        return Matcher(list(zip(self.symbols, events, strict=False)), self.pieces)

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
        text = _Text(tokenizer, ids)
        marks = self.find(ids)
        opening = next((mark for mark in marks if mark[1] == THINKING), None)
        if opening and self.opened_by_template and text.whole[: self._place(text, opening)[0]].strip():
            opening = None  # the model speaks of the tag inside the block that the template has opened
        if not opening and not self.opened_by_template:
            return Split("", self._answer(text, marks), False, 0)
        first, begin = (opening[0] + 1, self._place(text, opening)[1]) if opening else (0, 0)
        closing = next((mark for mark in marks if mark[0] >= first and mark[1] != THINKING), None)
        if not closing:
            return Split(text.whole[begin:], "", False, len(ids) - first)
        end, _ = self._place(text, closing)
        inside = max(0, text.token(end, closing[0]) - first)
        rest = [mark for mark in marks if mark[0] > closing[0]]
        return Split(text.whole[begin:end], self._answer(text, rest, closing), True, inside)

    def _place(self, text: _Text, mark: tuple[int, int]) -> tuple[int, int]:
        """The characters [begin, end) of the tag that is completed there."""
        last, event = mark
        number = 0 if event == THINKING else 2 if event == ANSWER and self.answer else 1
        upto, written = text.upto(last + 1), self.texts[number]
        begin = upto.rfind(written)
        # The token before may end within the tag's last character, of which each byte then reads as a character.
        if begin >= 0 and begin + len(written) > len(text.upto(last)) - 3:
            return begin, begin + len(written)
        # a tag that is not written as it is read
        return len(text.upto(last + 1 - len((self.open, self.close, self.answer)[number]))), len(upto)

    def _answer(self, text: _Text, marks: list[tuple[int, int]], closing: tuple[int, int] | None = None) -> str:
        """What follows the closing tag, up to the end, or what follows the last tag of an answer, up to the next tag;
        without special tokens. marks: those behind the closing tag."""
        begins, stop = closing, None
        if self.answer:
            begins = next((mark for mark in reversed(marks) if mark[1] == ANSWER), None)
            if not begins and (closing or marks):
                return ""
            if begins and (ends := next((mark for mark in marks if mark[0] > begins[0]), None)):
                stop = text.token(self._place(text, ends)[0], ends[0])
        if not begins:
            return text.visible()
        lead = len(text.upto(begins[0] + 1)) - self._place(text, begins)[1]
        return text.visible(begins[0] + 1, lead, stop)


class _Text:
    """A sequence of ids and its text; offsets are characters of `whole`."""

    def __init__(self, tokenizer: Any, ids: Sequence[int]):
        self.tokenizer, self.ids = tokenizer, list(ids)
        self.whole = self.upto(len(self.ids))

    def upto(self, stop: int, special: bool = True) -> str:
        """The text of the tokens [0, stop): decoded alone, others may lose a space in front."""
        return str(
            self.tokenizer.decode(
                self.ids[: max(stop, 0)], skip_special_tokens=not special, clean_up_tokenization_spaces=False
            )
        )

    def token(self, offset: int, last: int) -> int:
        """The token that holds the character at `offset`, not behind the token `last`."""
        while last > 0 and len(self.upto(last)) > offset:
            last -= 1
        return last

    def visible(self, start: int = 0, lead: int = 0, stop: int | None = None) -> str:
        """The text of the tokens [start, stop) without special ones, and the last `lead` characters before it."""
        before = len(self.upto(start, special=False))
        return self.upto(len(self.ids) if stop is None else stop, special=False)[before - lead :]


_found: WeakKeyDictionary[Any, tuple[Any, ThinkTags]] = WeakKeyDictionary()


def set_think_tags(tokenizer: Any, texts: Texts) -> None:
    """Say what the tags are, where `think_tags` would not find them or finds others. Kept in the tokenizer's
    own config (key "think"), so that it is saved with it."""
    tokenizer.init_kwargs["think"] = list(_checked(texts))


def _checked(texts: Any) -> Texts:
    if isinstance(texts, str) or not 2 <= len(texts) <= 3 or not all(isinstance(text, str) and text for text in texts):
        raise UsageError(f"think tags are {texts!r}: expected two texts, e.g. '<think>' and '</think>'")
    return tuple(texts)  # type: ignore[return-value]


def think_tags(tokenizer: Any, texts: Texts | None = None) -> ThinkTags:
    """The tags of the model's think block.

    Args:
        tokenizer: the model's tokenizer.
        texts: the two or three tags; None takes what `set_think_tags` or the tokenizer's config says ("think"), else
            the first of `KNOWN` whose tags the vocabulary holds, else the first of which the chat template writes one.

    Returns:
        The tags as token ids, which tell the phases of a text apart.

    Raises:
        UsageError: where there are none, and for texts that are not two or three.

    Example:
        >>> st.think_tags(tokenizer).texts
        ('<think>', '</think>')
    """
    configured = getattr(tokenizer, "init_kwargs", {}).get("think")
    texts = _checked(texts or configured) if texts or configured else None
    key = (texts, getattr(tokenizer, "chat_template", None))
    if (cached := _found.get(tokenizer)) is not None and cached[0] == key:
        return cached[1]
    texts = texts or _detect(tokenizer, tokenizer.get_vocab())
    # two tags of a known three may be named alone
    texts = next((tags for tags in KNOWN if tags[:2] == texts), texts)
    tags = _encode(tokenizer, texts)
    _found[tokenizer] = (key, tags)
    return tags


def think_tags_if_any(tokenizer: Any) -> ThinkTags | None:
    """The tags of the model's think block; None for a model that writes none, such as a base model."""
    try:
        return think_tags(tokenizer)
    except UsageError:
        return None


def _detect(tokenizer: Any, vocabulary: Mapping[str, int]) -> Texts:
    added = added_tokens(tokenizer)
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


def _special(tokenizer: Any, text: str, added: Mapping[str, int]) -> bool:
    """Whether the tag is several tokens of which the outer ones are special."""
    if not any(text.startswith(token) for token in added if token):
        return False
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    marks = set(added.values())
    return bool(ids) and ids[0] in marks and ids[-1] in marks


def _encode(tokenizer: Any, texts: Texts) -> ThinkTags:
    added = added_tokens(tokenizer)

    def ids(text: str) -> tuple[int, ...]:
        if text in added:
            return (added[text],)
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    opening, closing, *answer = [ids(text) for text in texts]
    symbols = pieces = None
    if not all(text in added or _special(tokenizer, text, added) for text in texts):
        special = {text: token for text, token in added.items() if tokenizer.added_tokens_decoder[token].special}
        symbols = [_symbols(text, special) for text in texts]
        pieces = _pieces(tokenizer, special, {symbol for tag in symbols for symbol in tag})
    tags = ThinkTags(opening, closing, False, answer[0] if answer else (), texts, symbols, pieces)
    return replace(tags, opened_by_template=_opened_by_template(tokenizer, tags))


def _symbols(text: str, special: Mapping[str, int]) -> Symbols:
    """A tag's bytes, and the ids of its special tokens, which are cut out first."""
    inside = sorted((token for token in special if token in text), key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, inside))})", text) if inside else [text]
    return [symbol for part in parts for symbol in ([special[part]] if part in special else latin(part))]


def _pieces(tokenizer: Any, special: Mapping[str, int], alphabet: set[Hashable]) -> dict[int, Symbols]:
    """The symbols of the tokens that may hold a part of a tag."""
    spelled = spellings(tokenizer).items()
    pieces: dict[int, Symbols] = {token: text for token, text in spelled if not alphabet.isdisjoint(text)}
    return pieces | {token: (token,) for token in special.values()}


def _opened_by_template(tokenizer: Any, tags: ThinkTags) -> bool:
    if not getattr(tokenizer, "chat_template", None):
        return False
    return tags.opened(render(tokenizer, "?"))


def render(
    tokenizer: Any,
    prompt: str,
    thinking: bool = True,
    system: str = "",
    history: Sequence[Mapping[str, str]] = (),
) -> str:
    """A user's message in the chat template, up to where the model begins to speak. No system message is sent unless
    one is given, since some templates refuse it. thinking: what templates with a switch for it (`enable_thinking`,
    `thinking`) are told; the others take no notice. history: the messages of earlier turns.

    Raises UsageError for a tokenizer without a chat template, and for a template that does not take the message.
    """
    messages: list[Mapping[str, str]] = [{"role": "system", "content": system}] if system else []
    return render_messages(tokenizer, [*messages, *history, {"role": "user", "content": prompt}], thinking)


def render_messages(tokenizer: Any, messages: Sequence[Mapping[str, Any]], thinking: bool = True) -> str:
    """Messages in the chat template, up to where the model begins to speak, or to the end of what it has said: without
    what the template closes a last message of the assistant's with, where the template shows this message as it is.
    Raises UsageError as `render`."""
    from jinja2 import TemplateError

    name = tokenizer.name_or_path or "this model"
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError(
            f"{name!r} has no chat template: choose a model with one, or, where the command has it, give --template, a "
            "text with {prompt}"
        )
    options = {"enable_thinking": thinking, "thinking": thinking, "tokenize": False}
    is_said = messages[-1]["role"] == "assistant"
    options["add_generation_prompt"] = messages[-1]["role"] == "user"
    try:
        with contextlib.suppress(ValueError):  # of a template that leaves parts of the message out
            return str(tokenizer.apply_chat_template(list(messages), continue_final_message=is_said, **options))
        return str(tokenizer.apply_chat_template(list(messages), **options))
    except TemplateError as error:
        roles = " and ".join(dict.fromkeys(str(message["role"]) for message in messages))
        raise UsageError(f"the chat template of {name!r} refuses {roles} messages ({error}): mend it") from error
