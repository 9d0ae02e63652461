"""What vLLM's Prometheus endpoint says of steering.

Tokens and slots are counted in the workers. They are asked when /metrics is read, as `GET /v1/steering` asks them, and
not at any other time: no step waits for a number.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

from steerable.engines.vllm.banks import KINDS

_PATIENCE = 2.0  # seconds; an engine that does not answer keeps nobody from the other metrics


@cache
def _metric(kind: str, name: str, about: str, labels: tuple[str, ...] = (), **more: str) -> Any:
    import prometheus_client

    return getattr(prometheus_client, kind)(f"steerable_{name}", about, labels, **more)


def count_requests() -> None:
    """One more steered request."""
    _metric("Counter", "requests", "Requests that asked to be steered and were taken in.").inc()


class Measured:
    """vLLM's application, whose metrics are brought up to date before they are read.

    ask: gives what every worker of each engine steers (`Steps.status`).
    """

    def __init__(self, app: Any, ask: Callable[[], Awaitable[Sequence[Sequence[dict[str, Any]]]]]) -> None:
        self.app, self.ask = app, ask

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"].removeprefix(scope.get("root_path", "")).rstrip("/") == "/metrics":
            with suppress(Exception):  # of a dead engine vLLM's own metrics tell
                self.set(await asyncio.wait_for(self.ask(), _PATIENCE))
        await self.app(scope, receive, send)

    def set(self, engines: Sequence[Sequence[dict[str, Any]]]) -> None:
        """Take over what the workers say: those of one engine all steer the same tokens, each engine others."""
        about = "Tokens that were steered, or that a gate on activations decided on."
        # A gauge, since several API servers ask the same engines, and the counters of processes are summed.
        tokens = _metric("Gauge", "tokens_total", about, multiprocess_mode="max")
        tokens.set(sum(max(worker["tokens"] for worker in workers) for workers in engines))
        for n, name in enumerate(("slots_used", "slots")):
            about = ("Slots that hold something.", "Slots that there are.")[n]
            gauge = _metric("Gauge", name, about, ("kind",), multiprocess_mode="mostrecent")
            for kind in KINDS:
                gauge.labels(kind).set(sum(max(worker[kind][n] for worker in workers) for workers in engines))
