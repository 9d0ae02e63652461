"""Chains labelled by their length: pairs of right answers, and one reference."""

from steerable.chains.annotators.length import length_pairs, length_spans, reference_length

TASKS = [{"id": name, "prompt": "?", "answer": "4"} for name in "abc"]


def chain(task, sample, tokens, answer="4", closed=True):
    return {
        "task_id": task, "sample": sample, "thinking": "x" * tokens, "answer": f"The answer is {answer}.",
        "closed": closed, "thinking_tokens": tokens,
    }  # fmt: skip


def labels(spans):
    return [[span["label"] for span in some] for some in spans]


def test_the_shortest_and_the_longest_right_answer_to_a_task():
    chains = [
        chain("a", 0, 50), chain("a", 1, 20), chain("a", 2, 90, answer="5"), chain("a", 3, 10, closed=False),
        chain("a", 4, 30), chain("b", 0, 20), chain("b", 1, 24), chain("c", 0, 9),
    ]  # fmt: skip
    spans = length_pairs(TASKS, chains)
    assert labels(spans) == [["long"], ["short"], [], [], [], [], [], []], "b's differ by a fifth, c has one"
    assert spans[0] == [{"task_id": "a", "sample": 0, "label": "long", "start": 0, "end": 50}]
    unjudged = length_pairs([{"id": "a", "prompt": "?"}], [chain("a", 0, 50), chain("a", 1, 90, answer="5")])
    assert labels(unjudged) == [["short"], ["long"]]


def test_against_a_reference():
    chains = [chain("a", k, tokens) for k, tokens in enumerate((10, 20, 30))]
    assert reference_length(chains) == 20
    assert labels(length_spans([*chains, chain("b", 0, 0)], 20)) == [["short"], ["long"], ["long"], []]
