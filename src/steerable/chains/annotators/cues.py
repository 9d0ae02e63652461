"""The cues of `keywords`: what a sentence of English reasoning says, and how much that speaks for each label.

A weight is a log-odds: with `u=2`, a cue makes `uncertainty-estimation` e^2 times as likely as it was. A sentence adds
up the weights of its cues. All were set by hand, from the definitions of the labels and from reading chains; none was
fitted. `deduction` stands lower than its frequency would put it, because kappa rewards a hit on a rare label more than
one on the label that half of the text has.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from steerable.chains.records import LABELS

Scores = Sequence[float]
"""One score for each of `LABELS`, in their order."""


class Cue(NamedTuple):
    """A pattern, which takes linear time at most, for sentences in lower case with straight apostrophes.

    opens: it is matched where the sentence begins, behind interjections; else it is searched from word to word.
    """

    pattern: re.Pattern[str]
    weights: Scores
    opens: bool


def weigh(**by_initial: float) -> Scores:
    """Scores by the initials of the labels (i, d, a, e, u, b), 0 for those that are not named."""
    return [by_initial.get(label[0], 0.0) for label in LABELS]


_VERBS = (
    r"is|are|was|were|has|have|can|does|do|don't|acts?|adds?|allows?|absorbs?|affects?|"
    r"appears?|attracts?|becomes?|begins?|belongs?|blocks?|breaks?|brings?|builds?|burns?|buys?|"
    r"carries|carry|causes?|changes?|comes?|connects?|consists?|contains?|controls?|costs?|covers?|"
    r"creates?|decreases?|defines?|depends?|describes?|destroys?|determines?|drives?|drops?|eats?|"
    r"emits?|enables?|encourages?|ends?|enters?|exists?|expands?|faces?|falls?|feeds?|feels?|fits?|"
    r"flows?|follows?|forms?|freezes?|gains?|gets?|gives?|goes|grows?|happens?|hangs?|helps?|"
    r"hits?|holds?|improves?|includes?|increases?|influences?|involves?|keeps?|kills?|lacks?|lasts?|"
    r"leads?|leaves?|lets?|likes?|limits?|links?|lives?|looks?|loses?|lowers?|makes?|means?|"
    r"measures?|melts?|moves?|needs?|occurs?|offers?|opens?|operates?|orbits?|passes|pays?|plays?|"
    r"prefers?|prevents?|produces?|protects?|proves?|provides?|pulls?|pushes|reacts?|reaches|reads?|"
    r"receives?|reduces?|refers?|reflects?|regulates?|releases?|relies|rely|remains?|represents?|"
    r"requires?|responds?|results?|returns?|rises?|rotates?|runs?|seeks?|sells?|sends?|separates?|"
    r"serves?|shares?|shows?|sinks?|sits?|slows?|speaks?|spends?|spins?|spreads?|stands?|starts?|"
    r"stays?|stops?|stores?|suffers?|supports?|swims?|takes?|tends?|throws?|touches|transforms?|"
    r"travels?|treats?|turns?|uses?|varies|vary|wants?|warms?|wears?|works?"
)
_WORDS = {
    "LET": r"(?:let me|let's|let us|(?:i|we)(?:'ll| will| can| could| should))(?: (?:just|also|now|first|try to))?",
    "PLAN": r"(?:\w+ )?(?:way|approach|method|solution|strategy|technique|route|idea|angle|path|perspective|option)\b",
    "TASK": r"(?:problem|question|task|puzzle|riddle|exercise|prompt|user|scenario)(?: (?:here|only|just|also))?",
    "VERB": rf"(?:{_VERBS})\b",
}


def _pattern(lines: str) -> str:
    """One alternative a line; the words of `_WORDS` stand for what they hold."""
    joined = "|".join(line.strip() for line in lines.strip().splitlines())
    for name, words in _WORDS.items():
        joined = joined.replace(name, words)
    return joined


def _cue(lines: str, **by_initial: float) -> Cue:
    return Cue(re.compile(rf"\b(?:{_pattern(lines)})"), weigh(**by_initial), opens=False)


def _opening(lines: str, **by_initial: float) -> Cue:
    return Cue(re.compile(rf"(?:{_pattern(lines)})"), weigh(**by_initial), opens=True)


PRIOR = weigh(i=-0.8, d=0.8, a=0.0, e=-0.7, u=-0.6, b=-0.8)
QUESTION = weigh(u=1.9, i=0.3, b=0.2, a=-0.8)
FORMULA = weigh(d=0.1, a=-0.8)
"""For a sentence with an equation or a calculation."""
DIGITS = weigh(a=-0.3)
"""For one with digits and no formula."""
BLOCK = weigh(d=0.8)
"""For a code block or displayed formula, instead of `PRIOR` and cues."""

FIRST = weigh(i=3.2)
"""For the first sentence of a chain."""
STAYS = weigh(i=1.2, d=0.3, a=0.7, e=1.7, u=0.4, b=0.4)
"""For the label of the sentence before; half of it over a blank line."""
ANNOUNCED = 1.0
"""For the label of the sentence before, `initializing` excepted, where that one ends with a colon."""
AWAY, MOST_AWAY = -0.3, -1.8
"""For `initializing`: for every sentence since the last with that label, and at most."""

#: A sentence that says only that thinking goes on belongs to the one before.
FILLER = re.compile(
    r"(?:(?:let me|let's|i'll|i should) (?:just )?(?:think|see|try|visuali[sz]e|picture|imagine|track|go|work|write|do|"
    r"break|compute|calculate)\b(?! (?:again|differently|of|back|another|a different))[^.?!:,;]{0,45}|interesting)"
    r"[.!\u2026]*$"
)

#: The interjections before what a sentence says, and what they speak for.
LEAD = re.compile(
    r"(?:(?:but|and|or|so|oh|ah|ok|okay|al?l ?right|well|great|good|perfect|h+m+|um|uh|now|then|yes|yeah|yep|also|wait|"
    r"hold on|hang on|first(?:ly)?|next|finally|a minute|a second|thus|therefore|hence)\b[,.:!\s\u2026-]*)+"
)
LEAD_CUES = [
    _cue(r"(?:wait|hold on|hang on)\b", u=1.9, b=1.5, d=0.3, a=-0.3, i=-0.6),
    _cue(r"(?:but wait|but hold on)\b", u=0.4, b=-0.2),
    _cue(r"h+m+\b", u=1.1, i=0.6, b=0.2),
    _cue(r"(?:so|then|therefore|thus|hence)\b", d=0.1, a=-1.3, e=-0.6, u=-0.6, b=-0.6, i=-0.3),
    _cue(r"(?:ok|okay|al?l ?right)\b", i=0.9),
    _cue(r"(?:yes|yeah|yep|great|good|perfect)\b", d=0.6),
    _cue(r"or\b", b=0.7, u=0.3),
]

_TASK = [
    _cue(
        r"""the TASK(?:'s| is| says?| states?| asks?| asking| wants?| gives?| mentions?| tells?| requires?| didn't)\b
        the TASK (?:statement|describes)""",
        i=2.4,
    ),
    _cue(
        r"""(?:i|we)(?:'m|'re|'ve| am| are| have| were)?(?: been)? (?:given|asked|told|supposed)\b
        trying to (?:figure|solve|find|understand|work out|determine)
        (?:i|we)(?:'ve got| have|'ve| got) (?:this|a|the|an) (?:\w+ ){0,2}(?:TASK|sequence)\b
        (?:the|my|our) (?:goal|objective|aim|job|task) (?:is|here)\b""",
        i=2.2,
    ),
    _cue(
        r"(?:i|we) (?:need|have|want|'ve got) to (?:find|figure|determine|solve|work out|understand|come up|compute|"
        r"calculate|prove|show|write|decide|answer|explain|identify|design|evaluate|complete|measure)\b",
        i=2.0,
    ),
    _cue(
        r"""let me (?:start(?! over| again| from)|begin|see|understand|figure|go through|recall what|consider the)
        let me think(?! (?:again|differently|about (?:it|this|that) (?:again|differently)))
        let me try to (?:understand|picture|figure|recall)
        let's see|i (?:think i )?should (?:start|recall|go)""",
        i=1.6,
    ),
    _cue(r"step[- ]by[- ]step|break (?:it|this|that|down|the)", i=1.3),
    _opening(r"given(?: that|:|,)|let's (?:break|analyze|start|begin)", i=1.2),
    _opening(
        r"to (?:solve|determine|find|answer|analyze|calculate|get|figure|understand|design|address|prove)\b", i=1.0
    ),
]

_DOUBT = [
    _cue(
        r"""not (?:\w+ )?(?:sure|certain|convinced|confident|clear)|unsure|uncertain|unclear|hesitant
        i (?:\w+ )?(?:wonder|doubt)\b|i guess|if i remember
        confus(?:ed|ing)|puzzled|stuck|(?:a bit|i'm) lost|mixed up|(?:in|into) circles|overcomplicat|overthink
        i (?:might|may|could) (?:be|have)\b|not getting (?:it|any)
        (?:i|we) (?:don't|do not|can't) (?:\w+ )?(?:know|remember|recall|understand|see how)
        hard to (?:say|tell|know|see)|tricky|a stretch""",
        u=3.0,
        a=-1.0,
        i=-0.8,
    ),
    _cue(
        r"""(?:seem|look|sound|feel)s? (?:a bit |a little |kind of |quite )?(?:off|odd|strange|weird|wrong|shaky)\b
        (?:seem|look|sound|feel)s? (?:a bit |a little |kind of |quite )?(?:contradictory|complicated|low|high|too \w+)
        feels? like a guess
        (?:doesn't|does not|might not|don't) (?:make sense|add up)|(?:doesn't|won't) (?:really )?help
        (?:isn't|is not|not) (?:very |that |so |as )?(?:helpful|easy|consistent)""",
        u=1.9,
        b=0.8,
    ),
    _cue(r"maybe|perhaps|possibly", u=1.0, b=0.5, a=-0.4, i=-0.4),
    _opening(r"maybe|perhaps", u=0.6, b=0.9),
    _cue(r"(?:maybe|perhaps) (?:i|we) (?:should|need)|(?:maybe|perhaps) it's better", b=1.0),
    _cue(r"(?:wait|hold on),? (?:but )?(?:maybe|perhaps)", b=1.6),
    _cue(r"(?:wait|hold on),? (?:but )?(?:if|when|since|so|let's)\b", d=0.9, a=0.5),
    _cue(r"i (?:think|believe|suppose|assume|feel)\b", u=1.5),
    _cue(r"(?:make|be) (?:sure|careful)|double[- ]check|missing something|missed (?:some|any)", u=1.2, e=0.3),
    _cue(r"(?:is|does|did|are|was|am|do) (?:that|this|it|i|they|these)\b[^.?]{0,40}\?", u=0.9),
    _cue(r"right\?|isn't it\?", u=-0.7, a=0.4),
    _cue(r"depend(?:s|ing) on|it's possible", u=0.6),
]

_TURN = [
    _opening(
        r"""alternatively\b|on second thought|never ?mind|correction
        (?:let me )?(?:scratch|scrap|forget) (?:that|it|this|the)""",
        b=3.4,
    ),
    _opening(r"no\b|nope|actually\b|oops|instead\b", b=2.2),
    _opening(r"no,? wait|(?:that's|this is|it's) not (?:right|true|correct)", b=1.5),
    _cue(
        r"""(?:another|a different|a new|an alternative|some other) PLAN
        (?:try|do|consider|use) (?:something|it|this|things) (?:else|differently|again)|differently
        (?:change|switch|abandon|revise|drop) (?:my|the|this|that|our) PLAN|reconsider|rethink|backtrack|correct myself
        (?:go|going|went) back\b|step back|(?:start|begin) (?:over|again|from scratch)|instead of
        back to (?:square one|the (?:start|beginning|drawing board))|dead end""",
        b=2.3,
    ),
    _cue(
        r"""(?:that|this|it)(?:'s| is| was) (?:not (?:quite )?(?:right|correct|true|it)|wrong|incorrect)\b(?! to)
        (?:that|this|it)(?:'s| is| was) an? (?:mistake|error)
        (?:can't|cannot|isn't|wasn't|does(?:n't| not) (?:seem|look|sound)) (?:be )?(?:quite )?(?:right|correct)\b
        (?:that|this|it|which) (?:doesn't|does not|didn't|won't|will not|isn't going to) (?:work|lead anywhere)\b
        i (?:think i |must have |may have |might have )?(?:made|make) (?:a|an|some) (?:\w+ )?(?:mistake|error)
        i (?:was wrong|forgot|misread|miscalculated|misunderstood|messed up|overlooked|mixed)|was a bad""",
        b=2.2,
        u=0.3,
    ),
    _cue(r"(?:think|look|check|read|start|try)(?: (?:about )?(?:it|this|that|the \w+(?: \w+)?))? again", b=1.4, u=0.5),
    _opening(r"what if\b", b=0.9, e=0.8),
    _cue(
        r"(?:i|we|he|she|they|it) (?:should|could|can|might) (?:also )?(?:look|switch|turn|start) (?:at|from|to)\b",
        b=0.9,
    ),
]

_EXAMPLE = [
    _cue(
        r"""(?:for|as an?|one) (?:example|instance)|an example|example:|e\.g\.
        test case|a case(?: where|:)|simple case|trial:""",
        e=3.0,
        a=-0.3,
    ),
    _cue(
        r"LET (?:test|plug|imagine|suppose|visuali[sz]e|pick|draw|try (?!to|a (?:different|new)|another|something))",
        e=2.6,
        i=-0.4,
    ),
    _opening(r"(?:suppose|imagine|assume|picture|say|pretend|consider (?:the case|a case|an?))\b", e=2.6, i=-0.6),
    _cue(r"LET (?:check|verify|confirm|validate|see (?:if|whether))", e=1.9, u=0.2),
    _cue(r"LET (?:take|consider|say|assign|label|assume) (?:that |an? |some |the |it |[a-z]\b|-?\d)", e=1.9, i=-0.4),
    _opening(r"(?:check|test|verif|trial|case \d|scenario \d)|[a-z] ?= ?-?\d+\b(?! ?[-+*=])", e=1.8),
    _cue(r"say (?:he|she|they|i|we|it)\b|(?:minute|time|case|day|round) \d+[,:]", e=1.6),
    _cue(
        r"""(?:if|for|with|when|take|try|at) (?:that )?[a-z]{1,8} ?(?:=|is -?\d)
        plug(?:ging)? (?:\w+ )?(?:in|back)|substituting back""",
        e=1.6,
    ),
]

_FACT = [
    _cue(
        r"""recall(?:ing)? (?:that|the)|(?:we|i) (?:also |think i |actually )?(?:remember|recall|learned|learnt|read)\b
        (?:i|we) (?:also )?know\b|i've (?:read|heard)|well[- ]known|(?:is|are|it's) (?:\w+ )?known
        by definition|definition of|refers? to|(?:is|are|be) (?:defined|called|referred to|known)|named|stands? for
        according to|as a rule|fact that|famous|classic|historian|studies|research|discovered|invented|conventions?""",
        a=2.4,
    ),
    _cue(
        r"""(?:formula|equation) (?:for|is|says|states|of)|theorem|lemma|axiom|laws? of|principle|propert(?:y|ies)
        inequality|distribution\b
        (?:number of ways|sum|area|volume|circumference|perimeter) (?:to|of) (?:a|an|the first n|choose)\b""",
        a=1.7,
    ),
    _cue(r"in (?:[1-9]\d\d|1\d{3}|20[012]\d)\b|centur(?:y|ies)", a=1.7),
    _cue(r"in general|generally|typically|usually|commonly|often|tends? to|always|traditionally|standard", a=1.3),
    _cue(
        r"""used (?:for|to|in|by|as)|such as|known as|consists? of|responsible for|caused by|linked to
        made (?:of|from|up)""",
        a=1.0,
    ),
    _cue(
        r"""(?:is|are) an? (?:\w+ )?(?:type|kind|form|measure|branch|process|technique|phenomenon|concept|device|tool)
        (?:is|are) an? (?:\w+ )?(?:unit|instrument|system|number|shape|polygon|substance|way|source|organ|gas)""",
        a=0.9,
    ),
    # Statements about things in general: what they are about has no "the", "this" or "I" before it.
    _opening(r"(?:an?|any|each|every|all|most|many|some|several|both|only) (?:[\w',-]+ ){1,4}VERB", a=1.9),
    _opening(
        r"(?!(?:the|this|that|these|those|it|they|there|he|she|i|we|you|if|so|then|here|what|how|which|who|where|when|let|"
        r"one|first|second|maybe|perhaps|actually|since|because|for|by|in|on|at|as|its|his|her|their|my|our|your|nothing|everything|another|next|"
        r"also|after|before|with|let's|an?|each|every|all|some|many|most|both)\b)[a-z][\w'-]*(?: [\w',-]+){0,3}? VERB",
        a=1.6,
    ),
    _opening(
        r"""in (?:a|an|any|most|many|some|similar|standard|english)\b
        in (?:physics|chemistry|biology|math\w*|geometry|probability|statistics|economics|logic)\b""",
        a=1.2,
    ),
    _opening(r"there (?:is|are)\b", a=1.2),
    _opening(r"because\b|this is because", a=1.1),
    _opening(r"the (?:[\w'-]+ ){1,4}VERB", a=0.8),
    _opening(r"(?:however, )?since\b", a=0.6),
    _opening(r"(?:it|they|its|their|there) (?:[\w'-]+ )?VERB", a=0.5),
    _cue(r"when (?:an?|you|something|\w+s)\b", a=0.3),
]

# Consequences, plans and calculations are `deduction`: they take from the statements in general.
_STEP = [
    _cue(r"would|could|might|may|will|should|must|has to|have to|needs? to|likely", a=-1.3),
    _cue(r"can (?:also )?(?:lead|improve|reduce|increase|result|cause|affect|be|then|now|use|only)\b", a=-1.0),
    _cue(
        r"""therefore|thus|hence|consequently|as a result|in conclusion|overall|so that|in total|follows that
        (?:this|that) (?:means|implies|suggests|gives|leaves|makes|would|explains|leads|confirms|shows)
        the (?:final )?answer|in (?:that|this) case""",
        d=0.1,
        a=-1.0,
        e=-0.4,
    ),
    _cue(
        r"""(?:i|we) (?:get|have|can|just|only|could|would|then|take|use|subtract|add|multiply|divide|compare|need)\b
        (?:i|we|he|she|they)(?:'d|'ll)\b|here,? """,
        a=-0.7,
    ),
    _opening(
        r"""(?:add|subtract|multiply|divid|expand|solv|simplify|substitut|calculat|comput|combin|fill|pour|empty|find)\w*\b
        (?:identify|determine|use|apply|count|treat|turn|place|weigh|look|start|following)\b""",
        d=0.3,
        a=-0.9,
    ),
    _opening(r"if\b|either way|this\b|that\b|these\b|those\b", a=-0.4),
]

CUES = [*_TASK, *_DOUBT, *_TURN, *_EXAMPLE, *_FACT, *_STEP]
