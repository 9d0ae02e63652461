"""Chat completions from any OpenAI-compatible server: concurrent, rate-limited, retried and cached.

The API key is read from the environment (`STEERABLE_API_KEY`, else `OPENAI_API_KEY`; a local server needs none) for
each call. No object that outlives the call holds it, and it appears in no file, message or log.

Retries are done here with the `openai` client's own turned off (`max_retries=0`). The client's retries bypass the
limits per minute, pause one request instead of all of them, do not follow a `Retry-After` of more than one or two
minutes (depending on its version), and do not cover a reply of status 200 without a completion in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib.util
import json
import os
import random
import re
import time
import warnings
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from steerable.store.errors import SteerableError, SteerableWarning, UsageError
from steerable.store.files import write_atomic

Messages = Sequence[Mapping[str, str]]
Progress = Callable[[int, int], None]
"""Called as `progress(replies, completion_tokens)` with what was done since the last call."""

OPENAI_URL = "https://api.openai.com/v1"
_FIRST_TRIES = 3  # to reach a server that has never answered
_LONGEST_WAIT = 600.0  # seconds that a server may ask us to wait
_SLOWEST_BACKOFF = 60.0


@dataclass(frozen=True)
class Reply:
    """The reply to one conversation. `finish` is the server's reason to stop (`stop`; `length` for a reply that was cut
    off), or `error` if there was no reply; then `error` says why in one sentence and `text` is empty."""

    text: str
    finish: str = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None

    @property
    def truncated(self) -> bool:
        """Whether the reply was cut off by the token limit."""
        return self.finish == "length"


@dataclass
class Account:
    """Requests and tokens of this process. Unlike those of `tally`, they depend on how often a run was interrupted."""

    sent: int = 0  # requests that went out, repeated ones included
    retries: int = 0
    cached: int = 0  # replies that came from the cache
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


def tally(replies: Sequence[Reply], prices: tuple[float, float] | None = None) -> dict[str, Any]:
    """Counts over a set of replies, the same whether they were requested now or came from the cache. Equal
    conversations of one call share a reply, which is counted once, as it is asked and paid for.

    prices: US dollars per million prompt and completion tokens; adds `cost`, in dollars.
    """
    replies = list({id(reply): reply for reply in replies}.values())
    counts: dict[str, Any] = {
        "requests": len(replies),
        "failed": sum(reply.error is not None for reply in replies),
        "truncated": sum(reply.truncated for reply in replies),
        "prompt_tokens": sum(reply.prompt_tokens for reply in replies),
        "completion_tokens": sum(reply.completion_tokens for reply in replies),
    }
    if prices is not None:
        counts["cost"] = round((counts["prompt_tokens"] * prices[0] + counts["completion_tokens"] * prices[1]) / 1e6, 6)
    return counts


class _Again(Exception):
    """A failure that a retry may cure; `wait` is the server's Retry-After in seconds, if it sent one, and `absent` is
    true if no server was reached."""

    def __init__(self, reason: str, wait: float | None = None, absent: bool = False) -> None:
        super().__init__(reason)
        self.wait, self.absent = wait, absent


class _NoRoom(Exception):
    """The model reads less than prompt and longest reply together: without the latter the server takes what is left."""


@dataclass
class Endpoint:
    """A model behind an OpenAI-compatible server.

    Args:
        model: the model's name at the server.
        base_url: such as `http://localhost:8000/v1`; None takes `OPENAI_BASE_URL`, else OpenAI's own address.
        concurrency: requests in flight at once.
        requests_per_minute, tokens_per_minute: rate limits, kept by spacing requests evenly. Prompt plus longest reply
            are counted until the true number of tokens is known.
        timeout: seconds for one whole reply.
        tries: how often a request is sent in all while it fails for a transient reason.
        backoff: seconds before the first retry; doubled for each further one, unless the server sends a Retry-After.

    Raises:
        UsageError: a setting is out of range, the address is none or holds a secret, or the library openai is missing.

    Example:
        >>> endpoint = Endpoint("gpt-4.1", requests_per_minute=500)
        >>> [reply] = endpoint.complete([[{"role": "user", "content": "What is 2 + 3?"}]])
    """

    model: str
    base_url: str | None = None
    concurrency: int = field(default=8, kw_only=True)
    requests_per_minute: float | None = field(default=None, kw_only=True)
    tokens_per_minute: float | None = field(default=None, kw_only=True)
    timeout: float = field(default=300.0, kw_only=True)
    tries: int = field(default=8, kw_only=True)
    backoff: float = field(default=1.0, kw_only=True)
    account: Account = field(default_factory=Account, init=False, compare=False)

    def __post_init__(self) -> None:
        if not self.model:
            raise UsageError("a language-model endpoint needs the model's name at the server")
        limits = [limit for limit in (self.requests_per_minute, self.tokens_per_minute) if limit is not None]
        if min(self.concurrency, self.tries) < 1 or min([self.timeout, *limits]) <= 0 or self.backoff < 0:
            raise UsageError(
                "concurrency and tries must be at least 1, timeout and limits per minute positive, backoff not negative"
            )
        self.base_url = self.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL
        url = urlsplit(self.base_url)
        if url.scheme not in ("http", "https"):
            raise UsageError(f"{self.host!r} is no server address: expected something like http://localhost:8000/v1")
        if "@" in url.netloc or url.query:  # the HTTP library logs addresses
            raise UsageError(
                f"the address of {self.host} must hold no user, password or query: set STEERABLE_API_KEY instead"
            )
        if importlib.util.find_spec("openai") is None:
            raise UsageError("asking a language model needs the library openai: pip install 'steerable[llm]'")
        self._gate = _Gate(self.requests_per_minute, self.tokens_per_minute)
        self._refused: dict[str, str] = {}  # settings that the model does not take -> what is sent instead, or ""
        self._notes: dict[str, None] = {}  # warnings that wait for the caller's thread

    def check_key(self) -> None:
        """Raises UsageError where OpenAI would be asked without a key."""
        _key(str(self.base_url))

    def __repr__(self) -> str:
        return f"Endpoint({self.model!r}, {self.host!r})"

    @property
    def host(self) -> str:
        """The address without what could be a secret in it (user, password, query)."""
        url = urlsplit(str(self.base_url))
        return f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}" if url.netloc else url.path

    def complete(
        self,
        conversations: Sequence[Messages],
        *,
        cache: Path | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        seed: int | Sequence[int] | None = None,
        progress: Progress | None = None,
        finished: Callable[[int, Reply], None] | None = None,
    ) -> list[Reply]:
        """One reply to each conversation, in order. Equal conversations (settings and seed included) are sent once.

        A setting that the model refuses (newer ones take `max_completion_tokens` for `max_tokens`, and no temperature)
        is left out of all requests, with a SteerableWarning. A failure of one request (a prompt that is too long, a
        server error that persists) becomes that reply's `error`.

        Args:
            conversations: each a list of `{"role", "content"}`.
            cache: a folder to which every reply is written at once, by the hash of model, messages and settings, so
                that a call that was killed requests only what is missing. Failures are not cached.
            temperature, max_tokens, seed: None leaves the choice to the server; `seed` may be one number for each
                conversation.
            progress, finished: called from another thread as replies arrive, the latter as `finished(index, reply)`.

        Raises:
            UsageError, SteerableError: for failures of all requests: a wrong key, an unknown model, a server that does
                not answer.
        """
        seeds = [seed] * len(conversations) if seed is None or isinstance(seed, int) else list(seed)
        if len(seeds) != len(conversations):
            raise UsageError(f"expected one seed for each of {len(conversations)} conversations, got {len(seeds)}")
        places: dict[str, list[int]] = {}
        requests: dict[str, dict[str, Any]] = {}
        for index, messages in enumerate(conversations):
            settings = {"temperature": temperature, "max_tokens": max_tokens, "seed": seeds[index]}
            request = {
                "model": self.model,
                "messages": [{key: _encodable(text) for key, text in message.items()} for message in messages],
                **{name: value for name, value in settings.items() if value is not None},
            }
            name = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
            places.setdefault(name, []).append(index)
            requests[name] = request
        replies: dict[int, Reply] = {}

        def arrived(name: str, reply: Reply) -> None:
            for index in places[name]:
                replies[index] = reply
                if finished is not None:
                    finished(index, reply)
                if progress is not None:
                    progress(1, reply.completion_tokens)

        for name in list(requests):
            if (cached := _cached(cache, name)) is not None:
                self.account.cached += len(places[name])
                arrived(name, cached)
                del requests[name]
        if requests:
            key = _key(self.host)
            try:
                _in_thread(lambda: self._ask_all(requests, key, cache, arrived))
            finally:
                for note in self._notes:
                    warnings.warn(note, SteerableWarning, stacklevel=2)
                self._notes.clear()
        return [replies[index] for index in range(len(conversations))]

    async def _ask_all(
        self,
        requests: Mapping[str, dict[str, Any]],
        key: str,
        cache: Path | None,
        arrived: Callable[[str, Reply], None],
    ) -> None:
        from openai import AsyncOpenAI

        remaining = iter(requests.items())

        async def worker(client: Any) -> None:
            for name, request in remaining:
                reply, sent = await self._ask(client, request, key)
                if reply.error is None and cache is not None:
                    record = {"sent": sent, "reply": asdict(reply)}
                    write_atomic(_file(cache, name), json.dumps(record, sort_keys=True, indent=1) + "\n")
                arrived(name, reply)

        async with AsyncOpenAI(
            api_key=key or "none", base_url=self.base_url, max_retries=0, timeout=self.timeout
        ) as client:
            tasks = [asyncio.create_task(worker(client)) for _ in range(min(self.concurrency, len(requests)))]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(self, client: Any, request: dict[str, Any], key: str) -> tuple[Reply, dict[str, Any]]:
        """The reply to a request after retries, and the settings that were really sent."""
        answered = self._gate.answered
        failures = 0
        while True:
            sent = self._accepted(request)
            expected = _expected_tokens(sent)
            await self._gate.wait(expected)
            self.account.sent += 1
            self.account.retries += failures > 0
            try:
                reply = await self._send(client, sent, key)
            except _NoRoom:
                self._gate.correct(expected, 0)
                request = {name: value for name, value in request.items() if name != "max_tokens"}
                continue
            except _Again as again:
                self._gate.correct(expected, 0)
                failures += 1
                reason = str(again)
                # Where none has ever answered, there is most likely no server.
                is_absent = again.absent and not self._gate.answered
                if failures >= (min(self.tries, _FIRST_TRIES) if is_absent else self.tries):
                    break
                backoff = min(self.backoff * 2 ** (failures - 1), _SLOWEST_BACKOFF) * random.uniform(0.75, 1.25)
                await asyncio.sleep(backoff if again.wait is None else again.wait * random.uniform(1.0, 1.05))
                continue
            self._gate.correct(expected, 0 if reply is None else reply.prompt_tokens + reply.completion_tokens)
            if reply is None:
                continue  # without a setting that the model does not take
            if reply.error is not None:
                self.account.failed += 1
                return reply, {}
            self._gate.answered += 1
            self.account.prompt_tokens += reply.prompt_tokens
            self.account.completion_tokens += reply.completion_tokens
            return reply, {name: value for name, value in sent.items() if name != "messages"}
        # If others were answered meanwhile, the fault lies with this request; if none was, with the server.
        if self._gate.answered == answered:
            raise SteerableError(
                f"{self.host} failed {failures} times in a row, the last time because {reason}: "
                "run the same command again; what was answered is kept"
            ) from None
        self.account.failed += 1
        return Reply("", "error", error=f"{failures} tries failed, the last one because {reason}"), {}

    async def _send(self, client: Any, request: dict[str, Any], key: str) -> Reply | None:
        """The reply to one request, errors that concern it alone included; None if the server refused a setting.

        Raises `_Again` for transient failures, `_NoRoom` for a longest reply that is too long, UsageError or
        SteerableError for failures of all requests.
        """
        import openai

        try:
            async with asyncio.timeout(self.timeout):
                raw = await client.chat.completions.with_raw_response.create(**request)
            return _read(raw.text, key)
        except (openai.APITimeoutError, TimeoutError):
            raise _Again(f"it did not answer within {self.timeout:g} s") from None
        except openai.APIConnectionError as error:
            cause = type(error.__cause__ or error).__name__
            raise _Again(f"the connection failed ({cause})", absent=cause == "ConnectError") from None
        except openai.APIStatusError as error:
            status, body = error.status_code, error.body if isinstance(error.body, dict) else {}
            message = body.get("message") or body.get("detail") or getattr(error.response, "reason_phrase", "")
            reason = f"{status}: {_line(str(message or 'no message'), key)}"
            headers = error.response.headers
        has_longest = request.keys() & {"max_tokens", "max_completion_tokens"}
        if status in (400, 422) and has_longest and _TOO_LONG.search(reason):
            raise _NoRoom
        if self._refuses(status, body, reason, request):
            return None
        is_quota = status == 429 and "insufficient_quota" in (body.get("code"), body.get("type"))
        if is_quota or not (status in (408, 409, 425, 429) or status >= 500):
            self._stop_if_hopeless(status, reason)
            return Reply("", "error", error=reason)
        wait = _retry_after(headers)
        if wait is not None and wait > _LONGEST_WAIT:
            raise SteerableError(
                f"{self.host} asks to wait {wait:.0f} s before the next request ({reason}): "
                "run the same command later; what was answered is kept"
            ) from None
        self._gate.pause(wait or 0)  # all requests, not this one alone
        raise _Again(reason, wait)

    def _accepted(self, request: dict[str, Any]) -> dict[str, Any]:
        named = {self._refused.get(key, key): value for key, value in request.items()}
        return {key: value for key, value in named.items() if key}

    def _refuses(self, status: int, body: Mapping[str, Any], reason: str, sent: Mapping[str, Any]) -> bool:
        """Whether the server refused a setting rather than the request; later requests are sent without it."""
        culprit = body.get("param") if str(body.get("code") or "").startswith("unsupported") else None
        if status not in (400, 422) or (culprit is None and not _UNSUPPORTED.search(reason)):
            return False
        for name, instead in _OPTIONAL.items():
            for setting, substitute in ((name, instead), (instead, "")):
                is_named = culprit == setting if culprit else re.search(rf"\b{setting}\b", reason)
                if setting in sent and is_named:
                    self._refused[name] = substitute
                    what = f"{substitute} is sent instead" if substitute else "it is left out"
                    self._notes[f"{self.model} does not take {setting}: {what}"] = None
                    return True
        return False

    def _stop_if_hopeless(self, status: int, reason: str) -> None:
        """Raise for failures that every other request would meet as well."""
        if status in (401, 403):
            raise UsageError(
                f"{self.host} refused the key ({reason}): set STEERABLE_API_KEY or OPENAI_API_KEY to one that is valid "
                f"there and may use {self.model}"
            ) from None
        if status in (404, 405):
            raise UsageError(
                f"{self.host} knows no model {self.model!r} or no chat completions ({reason}): check the model's "
                "name, and that the address ends in /v1"
            ) from None
        if status in (402, 429):
            raise SteerableError(
                f"the account at {self.host} is used up ({reason}): what was answered is kept"
            ) from None


#: Settings that a model may refuse, and what says the same in newer ones.
_OPTIONAL = {"max_tokens": "max_completion_tokens", "temperature": "", "seed": ""}
_UNSUPPORTED = re.compile(
    r"unsupported|not support|not allowed|not permitted|unknown (?:arg|param|name|field)|unrecogni[sz]ed|unexpected|"
    r"extra (?:input|field)",
    re.IGNORECASE,
)
#: Prompt and longest reply together are more than the model can read.
_TOO_LONG = re.compile(
    r"max_(?:completion_)?tokens\b.*(?:too large|greater than)|\d+ (?:in|for) the +completion", re.IGNORECASE
)


class _Gate:
    """The rate limiter: when the next request may start by the limits on requests and tokens and the common pause."""

    def __init__(self, requests: float | None, tokens: float | None) -> None:
        self.request_seconds = 60 / requests if requests else 0.0
        self.token_seconds = 60 / tokens if tokens else 0.0
        self.next_request = self.next_token = self.paused = 0.0
        self.answered = 0

    async def wait(self, tokens: int) -> None:
        while True:
            now = time.monotonic()
            start = max(now, self.paused, self.next_request, self.next_token)
            self.next_request = start + self.request_seconds
            self.next_token = start + tokens * self.token_seconds
            await asyncio.sleep(start - now)
            if self.paused <= time.monotonic():  # else the server asked for a pause meanwhile
                return

    def correct(self, expected: int, used: int) -> None:
        self.next_token += (used - expected) * self.token_seconds

    def pause(self, seconds: float) -> None:
        self.paused = max(self.paused, time.monotonic() + seconds)


def _in_thread(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a coroutine to its end in a thread of its own: a notebook's thread already runs an event loop.

    An interrupt here (Ctrl-C) cancels the requests under way at once.
    """
    with contextlib.closing(asyncio.new_event_loop()) as loop, ThreadPoolExecutor(1, "steerable-endpoint") as thread:
        task = loop.create_task(work())
        running = thread.submit(loop.run_until_complete, task)
        try:
            running.result()
        except BaseException:
            if not running.done():
                loop.call_soon_threadsafe(task.cancel)
            raise


def _key(host: str) -> str:
    key = (os.environ.get("STEERABLE_API_KEY") or os.environ.get("OPENAI_API_KEY") or "").strip()
    if not key and host.startswith(OPENAI_URL):
        raise UsageError(
            "no key for OpenAI: set STEERABLE_API_KEY or OPENAI_API_KEY, or name another server by its address "
            "(base URL), such as http://localhost:8000/v1"
        )
    if not key.isascii() or not key.isprintable():
        raise UsageError("the key in STEERABLE_API_KEY or OPENAI_API_KEY has characters that no key has")
    return key


def _read(body: str, key: str) -> Reply:
    """A reply from the server's JSON; `_Again` for what is no completion."""
    try:
        document = json.loads(body)
        choice = document["choices"][0]
        text, usage = choice["message"].get("content"), document.get("usage") or {}
        if choice.get("finish_reason") == "error":
            raise ValueError  # that of a server in front of others, one of which failed midway
        if isinstance(text, list):  # parts, of which those of thinking have no text
            text = "".join(part["text"] for part in text if isinstance(part.get("text"), str))
        return Reply(
            text=_hide(text, key) if isinstance(text, str) else "",
            finish=str(choice.get("finish_reason") or "stop"),
            prompt_tokens=_count(usage.get("prompt_tokens")),
            completion_tokens=_count(usage.get("completion_tokens")),
        )
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise _Again(f"its answer was no chat completion: {_line(body, key) or 'nothing'}") from None


def _line(text: str, key: str) -> str:
    """The beginning of what the server said, in one line, without the key if it repeats it."""
    return " ".join(_hide(text, key).split())[:300]


def _hide(text: str, key: str) -> str:
    return text.replace(key, "***") if len(key) >= 4 else text


def _count(value: Any) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait: `retry-after-ms`, or `retry-after` in seconds or as a date."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        value = headers.get(name, "")
        with contextlib.suppress(ValueError):
            return max(0.0, float(value) * unit)
        with contextlib.suppress(ValueError):
            return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    return None


def _expected_tokens(request: Mapping[str, Any]) -> int:
    characters = sum(len(text) for message in request["messages"] for text in message.values())
    longest = request.get("max_tokens") or request.get("max_completion_tokens") or characters // 4
    return characters // 4 + int(longest)


def _cached(cache: Path | None, name: str) -> Reply | None:
    """The reply that the cache holds; None for a missing or damaged file."""
    if cache is None:
        return None
    try:
        reply = Reply(**json.loads(_file(cache, name).read_bytes())["reply"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return reply if [type(value) for value in astuple(reply)] == [str, str, int, int, type(None)] else None


def _file(cache: Path, name: str) -> Path:
    return Path(cache) / name[:2] / f"{name}.json"


def _encodable(text: str) -> str:
    """The text with lone surrogates, which have no UTF-8 form, replaced."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
