"""Chat completions from any OpenAI-compatible server: many at once, within its limits, none asked for twice.

The key is read from the environment (`STEERABLE_API_KEY`, else `OPENAI_API_KEY`; a server of one's own needs
none) at the moment of asking. It is kept in no object that outlives the call, and stands in no file, message
or log.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import re
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from steerable.chains import answers
from steerable.chains.answers import Reply
from steerable.store.errors import SteerableError, SteerableWarning, UsageError
from steerable.store.files import write_atomic

Messages = Sequence[Mapping[str, str]]
Progress = Callable[[int, int], None]
"""Called as `progress(replies, completion_tokens)` with what was done since the last call."""

OPENAI_URL = "https://api.openai.com/v1"
_FIRST_TRIES = 3  # to reach a server that has never answered
_LONGEST_WAIT = 600.0  # seconds that a server may ask us to wait
_SLOWEST_BACKOFF = 60.0


@dataclass
class Account:
    """What was done in this process. It depends on how often a run was stopped; `tally` does not."""

    sent: int = 0  # requests that went out, repeated ones included
    retries: int = 0
    cached: int = 0  # replies that came from the cache
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


def tally(replies: Sequence[Reply], prices: tuple[float, float] | None = None) -> dict[str, Any]:
    """Counts of a set of replies that are the same whether they were asked for now or came from the cache.

    prices: US dollars per million prompt and completion tokens; gives `cost`, in dollars.
    """
    found: dict[str, Any] = {
        "requests": len(replies),
        "failed": sum(reply.error is not None for reply in replies),
        "truncated": sum(reply.truncated for reply in replies),
        "prompt_tokens": sum(reply.prompt_tokens for reply in replies),
        "completion_tokens": sum(reply.completion_tokens for reply in replies),
    }
    if prices is not None:
        cost = (found["prompt_tokens"] * prices[0] + found["completion_tokens"] * prices[1]) / 1e6
        found["cost"] = round(cost, 6)
    return found


@dataclass
class Endpoint:
    """A model behind an OpenAI-compatible server.

    model: its name there. base_url: such as `http://localhost:8000/v1`; None takes `OPENAI_BASE_URL`, else
    OpenAI's own. concurrency: requests under way at once. requests_per_minute, tokens_per_minute: limits that are kept
    by spacing requests evenly (prompt and longest reply count until the true number is known). timeout: seconds for
    one whole reply. tries: how often a request is sent that fails for a passing reason, with waits that double from
    `backoff` seconds, or as long as the server asks.
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
        if self.concurrency < 1 or self.tries < 1 or self.timeout <= 0 or self.backoff < 0:
            raise UsageError("concurrency and tries must be at least 1, timeout positive and backoff not negative")
        for limit in (self.requests_per_minute, self.tokens_per_minute):
            if limit is not None and limit <= 0:
                raise UsageError(f"a limit per minute must be positive, got {limit}")
        self.base_url = self.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL
        url = urlsplit(self.base_url)
        if url.scheme not in ("http", "https"):
            raise UsageError(f"{self.host!r} is no server address: expected something like http://localhost:8000/v1")
        if "@" in url.netloc or url.query:  # the HTTP library logs addresses
            raise UsageError(
                f"the address of {self.host} must hold no user, password or query: set STEERABLE_API_KEY instead"
            )
        self._gate = _Gate(self.requests_per_minute, self.tokens_per_minute)
        self._refused: dict[str, str] = {}  # settings that the model does not take -> what is sent instead, or ""
        self._notes: dict[str, None] = {}  # warnings that wait for the caller's thread

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
        """One reply to each conversation (a list of `{"role", "content"}`), in order.

        cache: a folder that keeps every reply at once, by the hash of model, messages and settings: a killed call
        that is made again asks only for what is missing. Failures are not kept. Conversations that are equal,
        settings and seed included, are asked once. None for `temperature`, `max_tokens` or `seed` leaves it to the
        server; `seed` may be one number for each conversation. `finished(index, reply)` is called as
        replies arrive; like `progress`, in another thread.

        A setting that the model refuses (newer ones take `max_completion_tokens` for `max_tokens`, and no
        temperature) is left out for all requests, with a SteerableWarning. What concerns one request (a
        prompt that is too long, a server that fails on it again and again) becomes that reply's `error`. What
        concerns all (a wrong key, an unknown model, a server that does not answer) raises one sentence.
        """
        seeds = [seed] * len(conversations) if seed is None or isinstance(seed, int) else list(seed)
        if len(seeds) != len(conversations):
            raise UsageError(f"expected one seed for each of {len(conversations)} conversations, got {len(seeds)}")
        places: dict[str, list[int]] = {}
        requests: dict[str, dict[str, Any]] = {}
        for index, messages in enumerate(conversations):
            request = {
                "model": self.model,
                "messages": [{key: _encodable(text) for key, text in message.items()} for message in messages],
            }
            request |= _given(temperature=temperature, max_tokens=max_tokens, seed=seeds[index])
            key = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
            places.setdefault(key, []).append(index)
            requests[key] = request
        replies: dict[int, Reply] = {}

        def arrived(key: str, reply: Reply) -> None:
            for index in places[key]:
                replies[index] = reply
                if finished is not None:
                    finished(index, reply)
                if progress is not None:
                    progress(1, reply.completion_tokens)

        missing = []
        for key in requests:
            if (kept := _kept(cache, key)) is None:
                missing.append(key)
            else:
                self.account.cached += len(places[key])
                arrived(key, kept)
        if missing:
            key = _key(self.host)
            try:
                _in_thread(lambda: self._ask_all({k: requests[k] for k in missing}, key, cache, arrived))
            finally:
                for note in self._notes:
                    warnings.warn(note, SteerableWarning, stacklevel=2)
                self._notes.clear()
        return [replies[index] for index in range(len(conversations))]

    async def _ask_all(
        self,
        requests: dict[str, dict[str, Any]],
        key: str,
        cache: Path | None,
        arrived: Callable[[str, Reply], None],
    ) -> None:
        from openai import AsyncOpenAI

        waiting = iter(requests.items())

        async with AsyncOpenAI(
            api_key=key or "none", base_url=self.base_url, max_retries=0, timeout=self.timeout
        ) as client:

            async def worker() -> None:
                for name, request in waiting:
                    reply, sent = await self._ask(client, request, key)
                    if reply.error is None and cache is not None:
                        write_atomic(_file(cache, name), _dump({"sent": sent, "reply": asdict(reply)}))
                    arrived(name, reply)

            tasks = [asyncio.create_task(worker()) for _ in range(min(self.concurrency, len(requests)))]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(self, client: Any, request: dict[str, Any], key: str) -> tuple[Reply, dict[str, Any]]:
        """A reply, and the settings that it was really asked with."""
        import openai

        answered = self._gate.answered
        reason = ""
        failures, tries = 0, self.tries
        while failures < tries:
            sent = self._accepted(request)
            expected = _expected_tokens(sent)
            await self._gate.wait(expected)
            self.account.sent += 1
            self.account.retries += failures > 0
            wait = self.backoff * 2**failures
            wait = min(wait, _SLOWEST_BACKOFF) * random.uniform(0.75, 1.25)
            try:
                async with asyncio.timeout(self.timeout):
                    raw = await client.chat.completions.with_raw_response.create(**sent)
                reply = answers.read(raw.text, key)
            except (openai.APITimeoutError, TimeoutError):
                reason = f"it did not answer within {self.timeout:g} s"
            except openai.APIConnectionError as error:
                cause = type(error.__cause__ or error).__name__
                reason = f"the connection failed ({cause})"
                if cause == "ConnectError" and not self._gate.answered:  # most likely there is no server there
                    tries = min(tries, _FIRST_TRIES)
            except openai.APIStatusError as error:
                reason = answers.reason(error, key)
                if self._refuses(error, reason, sent):
                    continue
                if not answers.passing(error):
                    self._stop_if_hopeless(error, reason)
                    self.account.failed += 1
                    self._gate.correct(expected, 0)
                    return Reply("", "error", error=reason), {}
                asked = answers.retry_after(error.response.headers)
                if asked is not None:
                    if asked > _LONGEST_WAIT:
                        raise SteerableError(
                            f"{self.host} asks to wait {asked:.0f} s before the next request ({reason}): "
                            "run the same command later; what was answered is kept"
                        ) from None
                    self._gate.pause(asked)  # all requests, not this one alone
                    wait = asked * random.uniform(1.0, 1.05)
            except ValueError as error:
                reason = str(error)
            else:
                self._gate.answered += 1
                self._gate.correct(expected, reply.prompt_tokens + reply.completion_tokens)
                self.account.prompt_tokens += reply.prompt_tokens
                self.account.completion_tokens += reply.completion_tokens
                return reply, {k: v for k, v in sent.items() if k != "messages"}
            self._gate.correct(expected, 0)
            failures += 1
            if failures < tries:
                await asyncio.sleep(wait)
        # If others were answered meanwhile, the fault lies with this request; if none was, with the server.
        if self._gate.answered == answered:
            raise SteerableError(
                f"{self.host} failed {failures} times in a row, the last time because {reason}: "
                "run the same command again; what was answered is kept"
            ) from None
        self.account.failed += 1
        return Reply("", "error", error=f"{failures} tries failed, the last one because {reason}"), {}

    def _accepted(self, request: dict[str, Any]) -> dict[str, Any]:
        named = {self._refused.get(key, key): value for key, value in request.items()}
        return {key: value for key, value in named.items() if key}

    def _refuses(self, error: Any, reason: str, sent: Mapping[str, Any]) -> bool:
        """Whether the server refused a setting rather than the request; then it is not sent again."""
        if error.status_code not in (400, 422):
            return False
        body = error.body if isinstance(error.body, dict) else {}
        told = body.get("param") if str(body.get("code") or "").startswith("unsupported") else None
        if told is None and not _UNSUPPORTED.search(reason):
            return False
        for name, instead in _OPTIONAL.items():
            for tried, next_ in ((name, instead), (instead, "")):
                if tried in sent and (told == tried or (told is None and re.search(rf"\b{tried}\b", reason))):
                    self._refused[name] = next_
                    what = f"{next_} is sent instead" if next_ else "it is left out"
                    self._notes[f"{self.model} does not take {tried}: {what}"] = None
                    return True
        return False

    def _stop_if_hopeless(self, error: Any, reason: str) -> None:
        """Raise for what every other request would be told as well."""
        status = error.status_code
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


class _Gate:
    """When the next request may start: two clocks, one counting requests and one tokens, and a common pause."""

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


def _in_thread(work: Callable[[], Any]) -> None:
    """Run a coroutine to its end in a thread of its own: a notebook's thread already runs an event loop.

    An interrupt here (Ctrl-C) cancels the requests under way at once.
    """
    failed: list[BaseException] = []
    started = threading.Event()
    running: list[Any] = []

    async def main() -> None:
        running.extend((asyncio.get_running_loop(), asyncio.current_task()))
        started.set()
        await work()

    def body() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:
            failed.append(error)
        finally:
            started.set()

    thread = threading.Thread(target=body, name="steerable-endpoint", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.1)
    except BaseException:
        started.wait()
        if running and thread.is_alive():
            loop, task = running
            loop.call_soon_threadsafe(task.cancel)
        thread.join(10)
        raise
    if failed:
        raise failed[0]


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


def _expected_tokens(request: Mapping[str, Any]) -> int:
    characters = sum(len(text) for message in request["messages"] for text in message.values())
    longest = request.get("max_tokens") or request.get("max_completion_tokens") or characters // 4
    return characters // 4 + int(longest)


def _kept(cache: Path | None, key: str) -> Reply | None:
    """A kept reply; None for a missing or damaged file."""
    if cache is None:
        return None
    try:
        found = Reply(**json.loads(_file(cache, key).read_bytes())["reply"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
    counts = (found.prompt_tokens, found.completion_tokens)
    sound = isinstance(found.text, str) and isinstance(found.finish, str) and all(isinstance(n, int) for n in counts)
    return replace(found, error=None) if sound else None


def _file(cache: Path, key: str) -> Path:
    return Path(cache) / key[:2] / f"{key}.json"


def _dump(record: Mapping[str, Any]) -> str:
    return json.dumps(record, sort_keys=True, indent=1) + "\n"


def _given(**settings: Any) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


def _encodable(text: str) -> str:
    """The text with lone surrogates, which have no UTF-8 form, replaced."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
