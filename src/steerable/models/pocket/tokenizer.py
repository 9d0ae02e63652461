"""The bundled model's tokenizer: whole words and whole numbers, with single bytes for everything else.

An ordinary byte-level BPE file without merges: a pre-token that stands in the vocabulary is one token
(``ignore_merges``), any other is spelt in bytes. So every text survives encoding and decoding unchanged.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from steerable.models.pocket.families import LARGEST_NUMBER

END, PAD, USER, ASSISTANT = "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
SPECIALS = (END, PAD, USER, ASSISTANT, THINK_OPEN, THINK_CLOSE)

_PIECE = r" ?[A-Za-z]+| ?[0-9]+|\n\n|\n| ?[^\sA-Za-z0-9]|\s"

# The generation prompt opens the think block, as the R1 distills' does; earlier turns keep their answers only.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{ '<|assistant|>' + message['content'].split('</think>')[-1] | trim + '<|end|>' }}"
    "{%- else -%}"
    "{{ '<|user|>' + message['content'] | trim }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|><think>\\n' }}{%- endif -%}"
)


def build_tokenizer(texts: Iterable[str], *, minimum: int = 3) -> PreTrainedTokenizerFast:
    """A tokenizer whose words are the pieces that stand at least ``minimum`` times in ``texts``."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(re.findall(_PIECE, text))
    words = [f" {n}" for n in range(LARGEST_NUMBER + 1)]
    words += [str(n) for n in range(LARGEST_NUMBER + 1) if counts[str(n)] >= minimum]
    words += sorted(w for w, n in counts.items() if n >= minimum and not w.strip().isdigit())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocabulary = {special: i for i, special in enumerate(SPECIALS)}
    spelt = ("".join(piece for piece, _ in byte_level.pre_tokenize_str(word)) for word in words)
    for entry in [*sorted(pre_tokenizers.ByteLevel.alphabet()), *spelt]:
        vocabulary.setdefault(entry, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_PIECE), behavior="isolated"), byte_level]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # The think tags are text that a reader wants to see, so only the turn marks are special.
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIALS[:4]])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in SPECIALS[4:]])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
