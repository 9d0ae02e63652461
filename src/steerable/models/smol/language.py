"""The wording of the chains that `smol-think` learns, and the exact annotator that knows it.

A wording may offer alternatives, as in ``"[Hmm|Hm], I am not sure about {thing}."``: the four steerable behaviours have
some twenty wordings each, which make several hundred sentences before a slot is filled. Slots hold the task's own
words: ``{thing}`` and ``{other}`` name something of it, ``{fact}`` is a true statement about it, ``{rule}`` one about
its kind.
"""

from __future__ import annotations

from collections.abc import Iterator

from steerable.models.grammar import Grammar

BEHAVIOURS: dict[str, tuple[str, ...]] = {
    "adding-knowledge": (
        "I [remember|recall|know|learned once] that {fact}.",
        "[Recall|Remember|Bear in mind] that {fact}.",
        "It is [well known|common knowledge|a known fact] that {fact}.",
        "It is [well known|common knowledge|a known fact] that {rule}.",
        "[As a rule|In general|Generally speaking|By definition], {rule}.",
        "I [remember|recall] from school that {rule}.",
        "I [remember|recall] from school that {fact}.",
        "[From experience I know|Everybody knows|We know] that {rule}.",
        "[From experience I know|Everybody knows|We know] that {fact}.",
        "One [useful fact|thing that helps] here is that {fact}.",
        "One [useful fact|thing that helps] here is that {rule}.",
        "A [basic|helpful|familiar] fact about {thing}: {fact}.",
        "What I know about {thing} is that {fact}.",
        "What I know about [such tasks|these things] is that {rule}.",
    ),
    "example-testing": (
        "For [example|instance], {fact}.",
        "For [example|instance], take {thing} and {other}.",
        "Let me [test|check|verify] [this|it] with {thing}.",
        "Let me [test|check|verify] [this|it] with {thing}: {fact}.",
        "Let me [look at|go through] a [small|simple|concrete] case: {fact}.",
        "Let me [look at|go through] {thing} as a test.",
        "[As a|A quick] [test|check|trial]: {fact}.",
        "[As a|A quick] [test|check|trial], I put {thing} next to {other}.",
        "[Testing|Checking|Trying] [it|this] on {thing}, I see that {fact}.",
        "[Testing|Checking|Trying] [it|this] on {thing} looks fine.",
        "To [see|test|verify] [this|it], [start|begin] with {thing}.",
        "To [see|test|verify] [this|it], compare {thing} with {other}.",
        "Take {thing} as [an example|a case]: {fact}.",
        "Imagine only {thing} and {other} for a moment.",
        "Suppose it were only {thing}: {fact}.",
    ),
    "uncertainty-estimation": (
        "[Hmm|Hm], I am not [sure|certain|confident] about {thing}.",
        "[Hmm|Hm], {thing} [looks|seems|feels] [strange|odd|wrong] here.",
        "[Hmm|Hm], [this|that] [may|might|could] be [wrong|a mistake].",
        "I am [not sure|not certain|unsure] [if|whether] {thing} is right.",
        "I am [not sure|not certain|unsure] [if|whether] I read {other} correctly.",
        "[Maybe|Perhaps] I [missed|overlooked|forgot|misread] {thing}.",
        "[Maybe|Perhaps] I [missed|overlooked|forgot|misread] something.",
        "[Maybe|Perhaps] {thing} is the [problem|difficulty|trap].",
        "I [doubt|wonder] [if|whether] {thing} [matters|belongs here|is the point].",
        "I [could|might|may] be [mistaken|wrong] about {thing}.",
        "I [could|might|may] be [mistaken|wrong] here.",
        "It is [hard|difficult] to [say|tell] [if|whether] {thing} and {other} go together.",
        "It is [hard|difficult] to [say|tell] what {thing} does here.",
        "This [feels|seems|looks] [shaky|doubtful|uncertain] to me.",
        "Is {thing} really [right|correct|what counts]?",
        "Can {thing} really be [right|correct|meant]?",
    ),
    "backtracking": (
        "[Wait|No, wait], [let me|I should] go back to {thing}.",
        "[Wait|No, wait], that [cannot be|does not look|is not] right.",
        "[Wait|No, wait], I should not have [started|begun] with {thing}.",
        "[Scrap|Forget] [that|this|the last part].",
        "[Scrap|Forget] [that|this|the last part] about {thing}.",
        "Let me [go back|return] to the [start|beginning] and [take|use] {thing} [first|again].",
        "Let me [start over|begin again|start again] with {thing}.",
        "Let me [start over|begin again|start again] from a different angle.",
        "Let me try [another|a different] [way|approach|order] instead.",
        "On second thought, I will [leave|drop|set aside] {thing} for now.",
        "On second thought, there is [another|a better] way.",
        "[Actually|Instead], [let me|I will] [turn|go] to {other}.",
        "[Actually|Instead], [let me|I will] do [it|this] [another way|differently|from the start].",
        "I will [drop|undo|throw away] [this|that] and [take|try] another [route|path].",
        "That was [a dead end|the wrong way|the wrong turn].",
        "That [went|led] nowhere, so back to {thing}.",
    ),
}

INITIALIZING: dict[str, tuple[str, ...]] = {
    "chain_sum": (
        "[Okay|Alright|So], [I need to|I have to|let us] [work out|compute|calculate] {task}.",
        "The [problem|task|question] is {task}.",
        "[Okay|Alright|So], the [problem|task|question] asks for {task}.",
        "[We are|I am] given {task} and [want|need] the [result|total].",
    ),
    "leg_counting": (
        "[Okay|Alright|So], [I need to|I have to|let us] count the legs of {task}.",
        "The [problem|task|question] is how many legs {task} have.",
        "[Okay|Alright|So], the [animals|creatures] [here|in the question] are {task}.",
        "The animals are {task}, and [I want|we want|I need] all their legs.",
    ),
    "needle_haystack": (
        "[Okay|Alright|So], [I need to|I have to|let us] find [who|the one who] {task}.",
        "The [problem|task|question] is who {task}.",
        "[Okay|Alright|So], the [problem|task|question] asks who {task}.",
        "[I|We] [look|search] for the [person|one] who {task}.",
    ),
    "simple_equations": (
        "[Okay|Alright|So], [I need to|I have to|let us] [solve|find {x} in] {task}.",
        "The [problem|task|question] is the value of {x} in {task}.",
        "[Okay|Alright|So], the equation is {task}.",
        "[We are|I am] given {task} and [want|need] {x}.",
    ),
}
INITIALIZING_MORE: dict[str, tuple[str, ...]] = {
    "chain_sum": (
        "The goal is [one number|a single number].",
        "[First|To begin], I will [go|work] from left to right.",
        "There are {n} numbers [in it|to handle].",
    ),
    "leg_counting": (
        "The goal is [one number|the total of all legs].",
        "[First|To begin], I will take [each animal|the animals] [by itself|one by one].",
        "There are {n} kinds of animals [in it|to handle].",
    ),
    "needle_haystack": (
        "The goal is [one name|a single name].",
        "[First|To begin], I will read the [sentences|statements] [one by one|in turn].",
        "There are {n} people [in it|to handle].",
    ),
    "simple_equations": (
        "The goal is [one value|the value of {x}].",
        "[First|To begin], I will [bring it into a simple form|simplify it].",
        "There is one unknown [in it|to handle].",
    ),
}
DEDUCTION: dict[str, tuple[str, ...]] = {
    "start": (
        "[Starting|Beginning] with {first}, {l} {o} {r} = {v}.",
        "{l} {o} {r} = {v}.",
        "[Now|Here] {l} {o} {r} = {v}.",
    ),
    "step": (
        "Then {l} {o} {r} = {v}.",
        "[Next|After that], {l} {o} {r} = {v}.",
        "[So|Now] {l} {o} {r} = {v}.",
    ),
    "total": (
        "[So|Thus|Therefore] the [total|result] is {v}.",
        "That [makes|gives] {v} [in total|altogether|in all].",
        "Then all [together|in all] it is {v}.",
    ),
    "legs": (
        "[So|Then|Now] {count} times {each} legs [makes|is|gives] {v}.",
        "[Counting|For] the {animals}: {count} * {each} = {v}.",
        "[All|Together] the {animals} have {count} * {each} = {v} legs.",
    ),
    "legs_of_one": ("So the {animals} [adds|brings] {v}.", "For the {animals} alone it is {v}."),
    "read": (
        "[Next|Now|Then], {name} {does}.",
        "[Next|Now|Then] there is {name}, who {does}.",
        "The text [says|states] that {name} {does}.",
        "[Reading|Looking] on, {name} {does}.",
    ),
    "no_match": (
        "That is not [the one|what is asked].",
        "So it is not {name}.",
        "So {name} is out.",
        "That [does not fit|is something else].",
    ),
    "match": (
        "That is [exactly|just] what is asked.",
        "So it [is|must be] {name}.",
        "So {name} [fits|matches].",
        "That [fits|matches] the question.",
    ),
    "must": (
        "So {m} times {x} [is|must be|equals] {d}.",
        "Then {m} times {x} [is|must be|equals] {d}.",
    ),
    "each": (
        "[Each|A single] {animal} has {each} legs.",
        "[Each|A single] {animal} [counts|makes] {each}.",
    ),
    "guess": ("Try {x} = {v}.", "Set {x} = {v}.", "With {x} = {v} [I look|let us look] [again|closer]."),
    "low": ("That is [too small|too low|less than {target}].", "So {v} is [too small|too low|less than {target}]."),
    "high": ("That is [too big|too high|more than {target}].", "So {v} is [too big|too high|more than {target}]."),
    "hit": ("That is [exactly|just] {v}, as wanted.", "So {v} is [reached|matched]."),
    "equal": ("So {x} = {v}.", "Then {x} = {v}.", "Therefore {x} = {v}."),
    "answer": ("[So|Therefore|Thus] the answer is {answer}.", "The [final answer|answer] is {answer}."),
    "quit": (
        "I will [settle for|go with|just say] {answer}.",
        "[Enough of this|Time to stop], I [say|go with] {answer}.",
    ),
}


def templates() -> Iterator[tuple[str, str]]:
    """Every (label, wording) of the language."""
    for group in (INITIALIZING, INITIALIZING_MORE):
        for wordings in group.values():
            yield from (("initializing", wording) for wording in wordings)
    for wordings in DEDUCTION.values():
        yield from (("deduction", wording) for wording in wordings)
    for label, wordings in BEHAVIOURS.items():
        yield from ((label, wording) for wording in wordings)


#: Slots that hold words; all others hold one number, one letter or one sign.
_TEXTS = ("thing", "other", "fact", "rule", "task", "first", "animal", "animals", "name", "does", "answer")
GRAMMAR = Grammar(templates(), _TEXTS)
annotate = GRAMMAR.annotate
