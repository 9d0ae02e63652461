"""Verifiable rewards: what a policy is paid for, and why.

The reward is +1 or -1 (Sinii et al. 2025, arXiv 2505.18706: no format reward, no partial credit). Who is right is
decided by `chains.judging`, the same judge that measures accuracy: the last box or the task's own format, exact
comparison of plain numbers first, symbolic comparison behind a guard and in a process that can be killed. So boxing the
question, or several guesses, is not paid.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

from steerable.chains.judging import judge
from steerable.errors import UsageError

REASONS = ("right", "wrong", "no-answer", "several-boxes", "parse-error", "timeout")
"""Every reason that a reward can have, for counters."""

Reward = Callable[[Mapping[str, Any], str | None], tuple[float, str]]
"""`reward(task, completion)`: the text behind the think block, None where the block was never closed."""


def reward(task: Mapping[str, Any], completion: str | None) -> tuple[float, str]:
    """(+1, "right") or (-1, reason). Raises UsageError for a task that has nothing to judge by."""
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
    """The control that pays by lot: +1 or -1, fixed by the seed, the task and the completion, so that a resumed run
    is the same run."""

    def by_lot(task: Mapping[str, Any], completion: str | None) -> tuple[float, str]:
        digest = hashlib.sha256(f"{seed}/{task['id']}/{completion}".encode()).digest()
        return (1.0 if digest[0] % 2 else -1.0), reward(task, completion)[1]

    return by_lot


def reward_of(name: str, seed: int) -> Reward:
    """The reward by its name: `correct`, `format` or `random`."""
    rewards = {"correct": reward, "format": format_only, "random": random_reward(seed)}
    if name not in rewards:
        raise UsageError(f"unknown reward {name!r}: expected {', '.join(rewards)}")
    return rewards[name]
