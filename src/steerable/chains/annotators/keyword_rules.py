"""Labels from keywords: free, fast (megabytes a second), and a good deal coarser than a judge.

`keywords` gives the six labels of Venhoff et al. 2025 (arXiv 2506.18167) to sentences, by rules of this library's own
for the English of reasoning models. `seal` gives the three labels of SEAL (Chen et al. 2025, arXiv 2504.07986) to
paragraphs, by its published rules. Both are annotators: plain functions of a chain record.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from steerable.chains.records import Record
from steerable.chains.segments import Segment, paragraphs, sentences

SEAL_LABELS = ("execution", "reflection", "transition")

# As published, its spelling mistake included.
_REFLECTION = (
    "verify",
    "make sure",
    "hold on",
    "think again",
    "'s correct",
    "'s incorrect",
    "let me check",
    "seems right",
)
_TRANSITION = (
    "think differenly",
    "another way",
    "another approach",
    "another method",
    "another solution",
    "another strategy",
    "another technique",
)


def seal_label(thought: str) -> str:
    """SEAL's label of one thought: reflection is tested first, then transition; all else is execution."""
    thought = thought.strip().lower()
    if thought.startswith("wait") or any(cue in thought for cue in _REFLECTION):
        return "reflection"
    if thought.startswith("alternatively") or any(cue in thought for cue in _TRANSITION):
        return "transition"
    return "execution"


def seal(chain: Mapping[str, Any]) -> list[Record]:
    """A chain's thoughts as spans with the labels of `SEAL_LABELS`.

    A thought is what stands between two boundaries "\\n\\n", without the white space around it; thoughts are not
    merged. The text before the first boundary is no thought, as published, so it has no span. SEAL reads and steers
    at the boundary token itself, the one before a span: the window `onset`.
    """
    text = chain["thinking"]
    boundary = text.find("\n\n")
    thoughts = [s for s in paragraphs(text) if 0 <= boundary < s.start]
    return [_span(chain, seal_label(text[s.start : s.end]), s.start, s.end) for s in thoughts]


def keywords(chain: Mapping[str, Any]) -> list[Record]:
    """A chain's sentences as spans with the six labels, neighbours of one label in one paragraph as one span.

    Every visible character is in exactly one span. A sentence gets the first label of these whose cue it has:

    1. `backtracking`: says that the approach changes ("another way", "go back", "that can't be right"), or opens with
       "Alternatively", "Scratch that", "No,", "Actually", ...
    2. `initializing`: speaks of the task, without doubt ("the problem says", "I need to find", ...)
    3. `uncertainty-estimation`: doubts ("not sure", "maybe", "Hmm", "Is that right?", "Wait, is it ...?")
    4. `backtracking` again: opens with "Wait" or "Hold on" and does not doubt.
    5. `example-testing`: takes a case or checks one ("for example", "let me test", "plugging in", ...)
    6. `adding-knowledge`: recalls ("recall that", "I know", "by definition", "the formula for", ...)

    Without a cue it is `initializing` where it opens the chain, or goes on with the opening ("First, ...", "Let me
    think."), and otherwise `deduction`. A code block or displayed formula takes the label of the sentence that
    announces it with a colon, and otherwise is `deduction`; a line without letters or digits goes on with the label
    before it.
    The cues are English: in another language all but the opening is `deduction`.
    """
    text = chain["thinking"]
    segments = sentences(text)
    spans: list[Record] = []
    end = 0
    for segment, label in zip(segments, _labels(text, segments), strict=True):
        if spans and spans[-1]["label"] == label and "\n\n" not in text[end : segment.start]:
            spans[-1]["end"] = segment.end
        else:
            spans.append(_span(chain, label, segment.start, segment.end))
        end = segment.end
    return spans


def _span(chain: Mapping[str, Any], label: str, start: int, end: int) -> Record:
    return {"task_id": chain["task_id"], "sample": chain["sample"], "label": label, "start": start, "end": end}


# The cues, in lower case with straight apostrophes. `_OPENS` patterns are matched where the sentence begins, behind
# interjections; the others are searched anywhere in it. None can take more than linear time.
_LEAD = re.compile(r"(?:(?:but|and|so|oh|ah|ok|okay|well|h+m+|um|now|then|yes|yeah|also|therefore)\b[,.!\s\u2026-]*)+")
_PLAN = r"(?:way|approach|method|solution|strategy|technique|route|idea|angle|path|perspective|interpretation)"
_TURN = re.compile(
    rf"\b(?:(?:another|a different|a new|an alternative|some other) (?:\w+ )?{_PLAN}\b"
    r"|(?:try|do|consider) (?:something|it|this|things) (?:else|differently|again)|(?:think|look at it|go) differently"
    rf"|(?:change|switch|abandon|rethink|reconsider|revise|drop) (?:my|the|this|that|our) (?:\w+ )?{_PLAN}\b"
    r"|(?:go|going|went|step|take a step) back|(?:start|begin) (?:over|again|from scratch)|backtrack|rethink"
    r"|back to (?:square one|the (?:start|beginning|drawing board))|dead end|on second thought"
    r"|(?:that|this|it)(?:'s| is| was) (?:not (?:quite )?(?:right|correct)|wrong|incorrect|a mistake|an error)\b(?! to)"
    r"|(?:can't|cannot|isn't|wasn't|does(?:n't| not) (?:seem|look|sound)) (?:be )?(?:right|correct)\b"
    r"|(?:that|this|it|which) (?:doesn't|does not|didn't|won't|will not|isn't going to) (?:work|lead anywhere|help)\b"
    r"|i (?:think i |must have |may have |might have )?(?:made|make) (?:a|an|some) (?:\w+ )?(?:mistake|error)"
    r"|i (?:was wrong|misread|miscalculated|misunderstood|messed up|overlooked))"
)
_TURN_OPENS = re.compile(
    r"(?:alternatively|instead,|instead of|actually|no[,.!]|nope|scratch|scrap|forget (?:that|it|about)|never ?mind|"
    r"strike that|correction)(?!\w)"
)
_STOP_OPENS = re.compile(r"(?:wait|hold on|hang on|oops|whoa|stop)(?!\w)")
_TASK = re.compile(
    r"\b(?:the (?:problem|question|task|puzzle|exercise|prompt|user)"
    r"(?:'s| says?| states?| asks?| asking| is| wants?| gives?| mentions?| tells?| requires?| statement| here)\b"
    r"|(?:i|we)(?:'m|'re|'ve| am| are| have| were)?(?: been)? (?:given|asked|told|supposed) "
    r"|(?:i|we) (?:need|have|want|'ve got) to (?:find|figure|determine|solve|work out|understand|come up|compute|"
    r"calculate|prove|show|write|decide|answer|explain|identify|design|evaluate|make|get) "
    r"|trying to (?:figure|solve|find|understand|work out|determine)"
    r"|(?:i|we)(?:'ve got| have|'ve| got) (?:this|a) (?:\w+ )?(?:problem|question|puzzle|task|scenario|riddle)"
    r"|(?:the|my|our) (?:goal|objective|aim|job) (?:is|here)|let me (?:read|parse|restate|reread|re-read|understand) )"
)
_DOUBT = re.compile(
    r"\b(?:not (?:\w+ )?(?:sure|certain|convinced|confident|clear|familiar)|unsure|uncertain|unclear|maybe|perhaps"
    r"|i (?:\w+ )?(?:wonder|doubt)|confus(?:ed|ing)|puzzled|stuck|i (?:guess|suppose)|i (?:might|may|could) (?:be|have)"
    r"|(?:don't|do not|can't) (?:\w+ )?(?:know|remember|recall|understand|see how)|hard to (?:say|tell|know|see)"
    r"|(?:seem|look)s? (?:off|odd|strange|weird|wrong|contradictory|counterintuitive|too \w+)"
    r"|(?:doesn't|does not) (?:make sense|add up)|feels? (?:off|wrong|shaky|like a guess)|i'm worried)\b"
)
_DOUBT_OPENS = re.compile(r"(?:(?:well|okay|ok|but|so|and|oh|now)[,.]? )?h+m+\b")
_QUESTION_OPENS = re.compile(
    r"(?:is|are|was|were|am|does|do|did|have|has|can|could|would|should|will|right|what if|why|"
    r"how (?:do|can) (?:i|we) know)\b"
)
_LET = (
    r"(?:let me|let's|let us|i'll|i will|i can|i could|i should|we can|we could)(?: (?:just|also|quickly|now|first))?"
)
_EXAMPLE = re.compile(
    r"\b(?:(?:for|as an) (?:example|instance)|an example|example:|e\.g\.|test case|small(?:er)? cases?|a case where"
    rf"|{_LET} (?:test|check|verify|confirm|double[- ]check|validate|plug|substitute|see (?:if|whether)"
    r"|try (?:with|it|this|an? example|plugging|some|a few|-?\d|[a-z]\b)"
    r"|take (?:some|an? (?:example|specific|simple|small)))"
    r"|(?:suppose|imagine|say|assume|consider|take|try|pick|set|if we let) (?:that )?[a-z]{1,2} ?(?:=|is -?\d)"
    r"|plug(?:ging)? (?:in|it|this|that|these|back|\S+ (?:in|back))|substituting (?:back|\S+ ?=|\S+ into)"
    r"|to (?:test|check|verify|illustrate) (?:this|that|it)\b"
    r"|(?:consider|imagine|picture) (?:the case|a case|an? (?:scenario|situation|example|concrete|specific|simple)))"
)
_EXAMPLE_OPENS = re.compile(r"(?:check(?:ing)?|test(?:ing)?|verify(?:ing)?|verification)(?!\w)")
_KNOWLEDGE = re.compile(
    r"\b(?:recall(?:ing)?|i (?:also |think i )?(?:remember|know|learned|learnt|read)|we know"
    r"|(?:well[- ])?known (?:fact|that|as)|(?:is|are|it's|well) (?:well[- ])?known|by definition"
    r"|definition of|refers to|(?:is|are) (?:defined|called|referred to)"
    r"|(?:formula|equation|expression) (?:for|is|says|states)"
    r"|theorem|lemma|axiom|laws? of|principle of|propert(?:y|ies) of"
    r"|according to|in general|generally|typically|usually|as a rule|fact that|from (?:school|physics|chemistry|"
    r"biology|geometry|algebra|calculus|history)|in (?:physics|chemistry|biology|mathematics|geometry|probability|"
    r"statistics|economics|logic|psychology|ecology|computer science)"
    r"|(?:is|are) an? (?:type|kind|form|measure|branch|process|technique|phenomenon|concept))\b"
)
_INTRODUCES = re.compile(
    r"(?:ok(?:ay)?|al?l ?right|first(?:ly)?|to (?:start|begin)|let'?s|given|"
    r"let me (?:start|begin|think|see|break))(?!\w)"
)


def label_of(sentence: str, introducing: bool = False) -> str:
    """The label of one sentence by its cues. `introducing`: all that stands before it introduces the task."""
    text = sentence.lower().replace("\u2019", "'").lstrip(" \t\n\"'*_#>-([")
    lead = _LEAD.match(text)
    core = text[lead.end() :] if lead else text
    asks = text.rstrip("\"' )*").endswith("?")
    doubts = _DOUBT.search(text) is not None or (asks and _QUESTION_OPENS.match(core) is not None)
    if _TURN_OPENS.match(core) or (not asks and _TURN.search(text)):
        return "backtracking"
    if not doubts and _TASK.search(text):
        return "initializing"
    if _STOP_OPENS.match(core):
        return "uncertainty-estimation" if doubts or asks else "backtracking"
    introduces = introducing and _INTRODUCES.match(core or text) is not None
    if doubts or (_DOUBT_OPENS.match(text) and not introduces):  # "Hmm, let me think" opens many a chain
        return "uncertainty-estimation"
    if _EXAMPLE.search(text) or _EXAMPLE_OPENS.match(core):
        return "example-testing"
    if _KNOWLEDGE.search(text):
        return "adding-knowledge"
    return "initializing" if introduces or (introducing and _INTRODUCES.match(text)) else "deduction"


def _labels(text: str, segments: Sequence[Segment]) -> list[str]:
    labels: list[str] = []
    introducing = True
    for i, segment in enumerate(segments):
        sentence = text[segment.start : segment.end]
        if segment.block:
            announced = i > 0 and text[segments[i - 1].end - 1] == ":"
            label = labels[-1] if announced else "deduction"
        elif labels and not any(character.isalnum() for character in sentence):
            label = labels[-1]
        else:
            label = label_of(sentence, introducing)
            if label == "deduction" and not labels:
                label = "initializing"
        introducing = introducing and label == "initializing"
        labels.append(label)
    return labels
