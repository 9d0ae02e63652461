"""What an OpenAI-compatible server says: replies, errors and how long to wait, read from its answers."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any


@dataclass(frozen=True)
class Reply:
    """What one conversation got. `finish` is the server's reason to stop (`stop`; `length` where the reply was
    cut off), or `error` where it got none; then `error` says why in a sentence and `text` is empty."""

    text: str
    finish: str = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None

    @property
    def truncated(self) -> bool:
        """Whether the reply was cut off by the token limit."""
        return self.finish == "length"


def read(body: str, key: str) -> Reply:
    """A reply from the server's JSON. ValueError, with the reason, for what is none; it is asked for again."""
    try:
        found = json.loads(body)
    except ValueError:
        raise ValueError("its answer was no whole JSON document") from None
    if not isinstance(found, dict) or not isinstance(found.get("choices"), list) or not found["choices"]:
        told = found.get("error") if isinstance(found, dict) else None
        told = told.get("message") if isinstance(told, dict) else told
        raise ValueError(f"it gave no choices{f': {_hide(str(told), key)[:200]}' if told else ''}")
    choice = found["choices"][0] if isinstance(found["choices"][0], dict) else {}
    message = choice.get("message")
    if not isinstance(message, dict):
        raise ValueError("its answer held no message")
    usage = found.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    text = message.get("content")
    return Reply(
        text=_hide(text, key) if isinstance(text, str) else "",
        finish=str(choice.get("finish_reason") or "stop"),
        prompt_tokens=_count(usage.get("prompt_tokens")),
        completion_tokens=_count(usage.get("completion_tokens")),
    )


def reason(error: Any, key: str) -> str:
    """What the server said, in one line: its status and message, without the key if it repeats it."""
    body = error.body if isinstance(error.body, dict) else {}
    said = body.get("message") or body.get("detail") or getattr(error.response, "reason_phrase", "") or "no message"
    return f"{error.status_code}: {' '.join(_hide(str(said), key).split())[:300]}"


def _hide(text: str, key: str) -> str:
    return text.replace(key, "***") if len(key) >= 4 else text


def passing(error: Any) -> bool:
    """Whether asking again may help."""
    if error.status_code == 429:
        body = error.body if isinstance(error.body, dict) else {}
        return "insufficient_quota" not in (body.get("code"), body.get("type"))
    return bool(error.status_code in (408, 409, 425) or error.status_code >= 500)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait: `retry-after-ms`, or `retry-after` in seconds or as a date."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            return max(0.0, float(value) * unit)
        except ValueError:
            pass
        try:
            return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
        except ValueError:
            pass
    return None


def _count(value: Any) -> int:
    return value if isinstance(value, int) and value > 0 else 0
