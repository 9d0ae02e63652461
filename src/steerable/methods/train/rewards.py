"""Verifiable rewards: what a policy is paid for, and why.

The reward is +1 or -1 (Sinii et al. 2025, arXiv 2505.18706: no format reward, no partial credit). Who is right is
decided by `chains.judging`, the same judge that measures accuracy: the last box or the task's own format, exact
comparison of plain numbers first, symbolic comparison behind a guard and in a process that can be killed. So boxing the
question, or several guesses, is not paid.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from steerable.chains.judging import final_answer, judge
from steerable.store.errors import UsageError

REASONS = ("right", "wrong", "no-answer", "several-boxes", "parse-error", "timeout")
"""Every reason that a reward can have, for counters."""

Reward = Callable[[Mapping[str, Any], str | None], tuple[float, str]]
"""`reward(task, completion) -> (reward, reason)`; the completion is the text behind the think block, or None where the
block was never closed. The task's `rollout` names the completion among all of a training."""


def reward(task: Mapping[str, Any], completion: str | None) -> tuple[float, str]:
    """+1 for a right answer, -1 for any other.

    Args:
        task: A task with `answer` or `entry`.
        completion: The text behind the think block; None where the block was never closed.

    Returns:
        The reward, and why: one of `REASONS`.

    Raises:
        UsageError: The task has nothing to judge by.

    Example:
        >>> reward({"id": "a", "prompt": "1 + 1?", "answer": "2"}, "\\\\boxed{2}")
        (1.0, 'right')
    """
    verdict = judge(task, completion)
    if verdict.reason == "unjudged":
        raise UsageError(
            f"task {task.get('id')!r} has neither an answer nor an entry, so nothing can be rewarded: give tasks with "
            "reference answers (docs/tasks.md)"
        )
    if completion is None:
        return -1.0, "no-answer"
    right = verdict.score is not None and verdict.score >= 1.0
    return (1.0, "right") if right else (-1.0, verdict.reason)


def format_only(task: Mapping[str, Any], completion: str | None) -> tuple[float, str]:
    """The control that pays for any answer that the judge can read, right or wrong: what form alone gains."""
    _, reason = reward(task, completion)
    return (1.0 if reason in ("right", "wrong") else -1.0), reason


def random_reward(seed: int) -> Reward:
    """The control that pays at random: +1 or -1, fixed by the seed and the rollout, so that a resumed run is the same
    run. Equal answers are drawn for apart."""

    def by_lot(task: Mapping[str, Any], completion: str | None) -> tuple[float, str]:
        digest = hashlib.sha256(f"lot {seed}/{task['rollout']}".encode()).digest()
        return (1.0 if digest[0] % 2 else -1.0), reward(task, completion)[1]

    return by_lot


def reward_of(name: str, seed: int) -> Reward:
    """The reward by its name: `correct`, `format` or `random`."""
    rewards = {"correct": reward, "format": format_only, "random": random_reward(seed)}
    if name not in rewards:
        raise UsageError(f"unknown reward {name!r}: expected {', '.join(rewards)}")
    return rewards[name]


#: A reply that is right for more of the tasks than this is what a policy would learn to write, whatever is asked.
MOST = 0.6
CONSTANTS = ("0", "1", "2", "yes", "no", "True", "False", "A", "B", "None", "[]", "{}", "nan", "banana")
"""Replies that are tried beside the commonest answers of the tasks."""


def refuse_constants(tasks: Sequence[Mapping[str, Any]]) -> None:
    """Raises UsageError where one constant reply is right for more than 60 % of the tasks.

    The share is that of the tasks given, less what the luck of a few of them may bring: the lower end of its 99 %
    interval (Wilson 1927, "Probable inference, the law of succession, and statistical inference") must lie above.
    """
    from scipy.stats import binomtest

    answers = Counter(_reference(task) for task in tasks)
    commonest = [answer for answer, _ in answers.most_common(6) if answer]
    some = tasks[:: max(1, len(tasks) // 40)]
    for reply in dict.fromkeys([*commonest, *CONSTANTS]):
        if _right(reply, some) < MOST / 2 * len(some):
            continue
        right = binomtest(_right(reply, tasks), len(tasks))
        if right.proportion_ci(0.99, method="wilson").low > MOST:
            raise UsageError(
                f"the constant reply {reply!r} is right for {right.statistic:.0%} of {len(tasks)} tasks, so training "
                f"would teach to write it whatever is asked: give tasks of which no reply is right for more than "
                f"{MOST:.0%}"
            )


def is_verifiable(task: Mapping[str, Any]) -> bool:
    """Whether there is something to judge by, and the judge finds the reference answer itself right."""
    if task.get("entry") is not None:
        return True
    answer = task.get("answer")
    return answer is not None and judge(task, f"\\boxed{{{final_answer(str(answer))}}}").reason == "right"


def _reference(task: Mapping[str, Any]) -> str:
    entry = task.get("entry")
    if entry is None:
        return final_answer(str(task.get("answer") or ""))
    # Where many answers are right, reasoning-gym gives one as an example.
    return str(entry.get("answer") or entry.get("metadata", {}).get("example_answer") or "")


def _right(reply: str, tasks: Sequence[Mapping[str, Any]]) -> int:
    return sum(reward(task, f"\\boxed{{{reply}}}")[0] > 0 for task in tasks)
