"""What vLLM's Prometheus endpoint says of steering."""

from __future__ import annotations

from functools import cache
from typing import Any


@cache
def _requests() -> Any:
    from prometheus_client import Counter

    return Counter("steerable_requests", "Requests that asked to be steered and were taken in.")


def count_requests() -> None:
    """One more steered request."""
    _requests().inc()
