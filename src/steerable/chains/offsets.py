"""Character offsets of generated tokens: which characters of a text each token holds.

A chain's ids are those that were generated. Tokenising its text need not give them back: a model may spell a word in
pieces that the tokenizer would have joined, or a character in bytes. So nothing that is measured on tokens may tokenise
the text again, except for chains without ids (older files, other tools').
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from os.path import commonprefix
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from steerable.store.errors import SteerableWarning, UsageError

if TYPE_CHECKING:
    from steerable.steering.think import ThinkTags

Offsets = list[tuple[int, int]]

_BROKEN = "\ufffd"  # what stands in a decoded text for bytes that are no character
_CONTEXT = 4  # tokens that are decoded before a token: an UTF-8 character has at most so many
_PIECES = 16  # tokens that may end within a character one after another


class ChainTokens(NamedTuple):
    """A chain as tokens: its prompt's, where that was asked for, and those of what the model wrote.

    offsets: [start, end) characters of `thinking` that each token holds; an empty range for one that holds none.
    """

    ids: list[int]
    prompt: int
    """How many of them are the prompt's."""
    offsets: Offsets

    def thinking(self) -> list[int]:
        """The places of the tokens that hold a character of the thinking text."""
        return [place for place, (start, end) in enumerate(self.offsets) if end > start]


def token_offsets(tokenizer: Any, ids: Sequence[int], *, skip_special_tokens: bool = False) -> tuple[str, Offsets]:
    """The text of token ids and the characters of it that each of them holds, in time linear in their number.

    Args:
        tokenizer: any tokenizer that can decode.
        ids: token ids.
        skip_special_tokens: leave special tokens out of the text.

    Returns:
        The decoded text (no spaces cleaned up), and [start, end) for each id. Tokens that share a character, each
        bringing some of its bytes, all hold it; one that shows nothing has an empty range.

    Example:
        >>> text, offsets = token_offsets(tokenizer, chain["ids"])
    """
    return _Decoder(tokenizer, skip_special_tokens).read(ids)


def chain_tokens(
    tokenizer: Any,
    chains: Sequence[Mapping[str, Any]],
    prompts: Mapping[str, str] | None = None,
    tags: ThinkTags | None | Literal["auto"] = "auto",
) -> list[ChainTokens]:
    """Chain records as the tokens that the model read and wrote: their `prompt_ids` and `ids`.

    Chains without ids, and those whose ids do not decode to their text (they belong to another tokenizer, or the text
    was changed), are cut into tokens again; the latter are counted in a SteerableWarning.

    Args:
        tokenizer: the model's tokenizer.
        chains: chain records.
        prompts: each task's text after the chat template, for chains that do not have it as ids; None leaves the prompt
            out.
        tags: of the think block; default those of the tokenizer, None for a model without one.

    Raises:
        UsageError: a chain's task has no prompt, or a text must be cut into tokens by a tokenizer that does not report
            character offsets.
    """
    from steerable.steering.think import think_tags_if_any  # here: torch takes seconds

    if any(chain.get("ids") is None for chain in chains):
        _check_offsets(tokenizer)
    tags = think_tags_if_any(tokenizer) if tags == "auto" else tags
    decoders = [_Decoder(tokenizer, skip) for skip in (False, True)]
    read: list[ChainTokens] = []
    strangers = 0
    for chain in chains:
        offsets = None if chain.get("ids") is None else _placed(decoders, chain, tags)
        strangers += offsets is None and chain.get("ids") is not None
        if offsets is None:
            read.append(_from_text(tokenizer, chain, prompts, tags))
            continue
        before = [] if prompts is None else _prompt_ids(tokenizer, chain, prompts)
        read.append(ChainTokens([*before, *chain["ids"]], len(before), [(0, 0)] * len(before) + offsets))
    if strangers:
        warnings.warn(
            f"the token ids of {strangers} of {len(chains)} chains do not decode to their text (another tokenizer "
            "wrote them, or the text was changed): the text is cut into tokens again",
            SteerableWarning,
            stacklevel=3,
        )
    return read


# --- chains ---


def _check_offsets(tokenizer: Any) -> None:
    if not getattr(tokenizer, "is_fast", False):
        raise UsageError(
            "a chain without the token ids that were generated needs a fast tokenizer, because it reports character "
            f"offsets; {type(tokenizer).__name__} is not one: load it with use_fast=True"
        )


def _prompt_ids(tokenizer: Any, chain: Mapping[str, Any], prompts: Mapping[str, str]) -> list[int]:
    prompt = _prompt(chain, prompts)
    if (ids := chain.get("prompt_ids")) is not None:
        return list(ids)
    return list(tokenizer(prompt, add_special_tokens=False)["input_ids"])


def _prompt(chain: Mapping[str, Any], prompts: Mapping[str, str]) -> str:
    if (prompt := prompts.get(chain["task_id"])) is None:
        raise UsageError(f"there is no prompt for the chain of task {chain['task_id']!r}: pass all tasks")
    return prompt


def _from_text(
    tokenizer: Any, chain: Mapping[str, Any], prompts: Mapping[str, str] | None, tags: ThinkTags | None
) -> ChainTokens:
    """A chain without ids: its text is cut into tokens, with the tags put back where they stood."""
    _check_offsets(tokenizer)
    thinking = str(chain["thinking"])
    prompt = "" if prompts is None else _prompt(chain, prompts)
    head, text = len(prompt), prompt + thinking
    if prompts is not None and tags is not None:
        head = len(before := tags.before_thinking(prompt))
        text = prompt + tags.written(prompt, chain) if "answer" in chain else before + thinking
    # The template has already written the special tokens.
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"]
    first = next((i for i, (_, end) in enumerate(offsets) if end > len(prompt)), len(offsets))
    return ChainTokens(list(encoded["input_ids"]), first, _within(offsets, head, len(thinking)))


def _placed(decoders: Sequence[_Decoder], chain: Mapping[str, Any], tags: ThinkTags | None) -> Offsets | None:
    """The characters of the thinking text that each generated id holds; None where the ids have another text."""
    thinking, ids = str(chain["thinking"]), chain["ids"]
    try:
        for decoder in decoders:
            if not thinking:
                answer = "".join(str(chain.get("answer", "")).split())
                if answer in "".join(decoder.decode(ids).split()):
                    return [(0, 0)] * len(ids)
                continue
            text, offsets = decoder.read(ids)
            if (start := _find(text, thinking, bool(chain.get("closed")), tags)) is not None:
                return _within(offsets, start, len(thinking))
            # as `decode` leaves it that takes spaces out before full stops and the like
            if (places := _with_fewer_spaces(text, thinking)) is not None:
                return _within([(places[start], places[end]) for start, end in offsets], 0, len(thinking))
    except (OverflowError, IndexError, TypeError):  # what tokenizers say of an id that they do not have
        pass
    return None


def _find(text: str, thinking: str, closed: bool, tags: ThinkTags | None) -> int | None:
    """Where the thinking text begins in the text of all ids."""
    opening, closing = ("", "") if tags is None else tags.texts[:2]
    begins = [text.find(opening) + len(opening)] if opening and opening in text else []
    begins.append(0)
    # as it is; then without white space around it, or the end of it
    begins += [len(text) - len(text[begin:].lstrip()) for begin in begins]
    for end in dict.fromkeys((closing if closed else "", "")):
        for begin in begins:
            if text.startswith(thinking + end, begin):
                return begin
    return text.index(thinking) if text.count(thinking) == 1 else None


def _with_fewer_spaces(text: str, thinking: str) -> list[int] | None:
    """For every place in the text the place in `thinking`, if that is the text less some spaces."""
    places, at = [], 0
    for character in text:
        places.append(at)
        if at < len(thinking) and character == thinking[at]:
            at += 1
        elif character != " ":
            return None
    return [*places, at] if at == len(thinking) else None


def _within(offsets: Sequence[tuple[int, int]], begin: int, length: int) -> Offsets:
    """Offsets counted from `begin`, cut to the `length` characters behind it."""
    cut = [(max(start - begin, 0), min(end - begin, length)) for start, end in offsets]
    return [(start, end) if start < end else (0, 0) for start, end in cut]


# --- tokens ---


class _Decoder:
    """Reads ids one by one, remembering what each one shows behind another token."""

    def __init__(self, tokenizer: Any, skip_special_tokens: bool) -> None:
        self.tokenizer, self.skip = tokenizer, skip_special_tokens
        self.pieces: dict[int, str | None] = {}
        self.word: list[int] | None = None

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=self.skip, clean_up_tokenization_spaces=False))

    def read(self, ids: Sequence[int]) -> tuple[str, Offsets]:
        text = self.decode(ids)
        offsets = list(self._walk(ids, text))
        if len(offsets) < len(ids) or max((end for _, end in offsets), default=0) != len(text):
            offsets = self._by_prefixes(ids, text)
        return text, offsets

    def _piece(self, token: int) -> str | None:
        """What a token shows behind a word; None where the word shows otherwise before it."""
        if token not in self.pieces:
            if self.word is None:
                self.word = self._some_word()
            before, both = self.decode(self.word), self.decode([*self.word, token])
            self.pieces[token] = both[len(before) :] if both.startswith(before) else None
        return self.pieces[token]

    def _some_word(self) -> list[int]:
        """A token of plain letters: behind it others show the space that they may lose at the beginning of a text."""
        for token in range(min(len(self.tokenizer), 10_000)):
            if (text := self.decode([token])).isascii() and text.isalpha():
                return [token]
        return []

    def _walk(self, ids: Sequence[int], text: str) -> Iterator[tuple[int, int]]:
        """Offsets of the ids; it ends early where they cannot be told so."""
        at = first = 0  # the characters of the tokens before `first` end at `at`
        shown = ""  # by the tokens from `first` on, which end within a character
        for place, token in enumerate(ids):
            piece = self._piece(token) if at else self.decode([token])
            if not shown and piece is not None and _BROKEN not in piece and text.startswith(piece, at):
                yield at, at + len(piece)
                at, first = at + len(piece), place + 1
                continue
            new, same = self._shown(ids, first, place + 1, text, at)
            if not new and _BROKEN in (piece or "") and text[at - 1 : at] == _BROKEN:
                yield at - 1, at  # more of the bytes that were no character
            else:
                begin = at + len(commonprefix([shown.rstrip(_BROKEN), new]))
                yield begin, at + same + (same < len(new))
            if same == len(new):
                at, first, shown = at + same, place + 1, ""
            elif new.endswith(_BROKEN) and place - first < _PIECES:
                shown = new
            else:
                return

    def _shown(self, ids: Sequence[int], first: int, stop: int, text: str, at: int) -> tuple[str, int]:
        """What the tokens [first, stop) show, and how many characters of that stand in the text at `at`."""
        context = ids[max(0, first - _CONTEXT) : first]
        before, both = self.decode(context), self.decode([*context, *ids[first:stop]])
        # Alone they lose a space in front, but there are decoders that show all bytes in a row as broken until they are
        # whole, those of the context too.
        for new in (both[len(before) :] if both.startswith(before) else None, self.decode(ids[first:stop])):
            if new is not None and text.startswith(new, at):
                return new, len(new)
        assert new is not None
        return new, len(commonprefix([new, text[at : at + len(new)]]))

    def _by_prefixes(self, ids: Sequence[int], text: str) -> Offsets:
        """By decoding every prefix: for decoders in which a token changes what stands far before it."""
        lengths, same = [], []
        for stop in range(len(ids) + 1):
            prefix = self.decode(ids[:stop])
            lengths.append(len(prefix))
            same.append(len(commonprefix([prefix, text])))
        settled = list(accumulate(reversed(same), min))[::-1]
        ends = [min(n + (n < length), len(text)) for n, length in zip(settled, lengths, strict=True)]
        return list(zip(settled[:-1], ends[1:], strict=True))
