"""The endpoint's client against a real server on loopback that misbehaves in every way it can."""

import email.utils
import json
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Barrier, Lock, Thread

import pytest

from steerable.chains.endpoint import Endpoint, Reply, tally
from steerable.store.errors import SteerableError, SteerableWarning, UsageError

KEY = "sk-test-0123456789-do-not-tell"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_POST(self):
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = request["messages"][-1]["content"]
        with server.lock:
            server.times.append(time.monotonic())
            server.requests.append(request)
            server.keys.add(self.headers["Authorization"])
            count = server.texts.count(text)
            server.texts.append(text)
        server.act(self, request, text, count)

    def send(self, status, body, headers=(), length=None):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(length or len(data)))
        self.send_header("Connection", "close")
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
        self.close_connection = True

    def answer(self, text, finish="stop"):
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
        self.send(200, {"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 3}})

    def fail(self, status, message, headers=(), **more):
        self.send(status, {"error": {"message": message, **more}}, headers)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *args):  # a client that goes away is part of the test
        pass


def echo(handler, request, text, count):
    handler.answer(text.upper())


@pytest.fixture
def server(monkeypatch):
    for name in ("OPENAI_API_KEY", "STEERABLE_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    server = Server(("127.0.0.1", 0), Handler)
    server.lock = Lock()
    server.times, server.requests, server.texts, server.keys = [], [], [], set()
    server.act = echo
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def say(*texts):
    return [[{"role": "user", "content": text}] for text in texts]


def client(server, **options):
    return Endpoint("m", server.url, **{"backoff": 0.01, "timeout": 5.0, **options})


def test_replies_come_in_order_and_are_counted(server, tmp_path):
    def act(handler, request, text, count):
        time.sleep(0.05 if text == "a" else 0)
        echo(handler, request, text, count)

    server.act = act
    endpoint = client(server)
    done = []
    replies = endpoint.complete(say("a", "b", "a", "c"), cache=tmp_path, progress=lambda *d: done.append(d))
    assert [reply.text for reply in replies] == ["A", "B", "A", "C"]
    assert sorted(server.texts) == ["a", "b", "c"]  # equal ones are asked once
    assert done == [(1, 3)] * 4
    assert tally(replies, (1e6, 2e6)) == {
        "requests": 3,
        "failed": 0,
        "truncated": 0,
        "prompt_tokens": 21,
        "completion_tokens": 9,
        "cost": 39.0,
    }
    assert (endpoint.account.sent, endpoint.account.retries, endpoint.account.prompt_tokens) == (3, 0, 21)


def test_settings_are_sent_and_are_part_of_the_cache_key(server, tmp_path):
    endpoint = client(server)
    for settings in ({}, {"temperature": 0.5}, {"max_tokens": 9}, {"seed": [4, 5]}, {"seed": [4, 6]}):
        endpoint.complete(say("a", "b"), cache=tmp_path, **settings)
    sent = [{k: v for k, v in r.items() if k not in ("messages", "model")} for r in server.requests]
    expected = [{}, {}, {"temperature": 0.5}, {"temperature": 0.5}, {"max_tokens": 9}, {"max_tokens": 9}]
    assert sorted(map(str, sent)) == sorted(map(str, [*expected, {"seed": 4}, {"seed": 5}, {"seed": 6}]))
    Endpoint("other", server.url).complete(say("a"), cache=tmp_path)
    assert len(server.requests) == 10
    moved = Endpoint("m", server.url.replace("127.0.0.1", "localhost"))
    assert moved.complete(say("a"), cache=tmp_path)[0].text == "A"  # another address, the same content
    assert len(server.requests) == 10
    with pytest.raises(UsageError, match="one seed for each of 2"):
        endpoint.complete(say("a", "b"), seed=[1])


def reset(handler):
    """Close so that the client sees a connection reset."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


def cut_body(handler):
    handler.send(200, b'{"choices": [', length=5000)
    handler.wfile.flush()
    handler.connection.shutdown(socket.SHUT_RDWR)


PASSING = {
    "429": lambda h: h.fail(429, "slow down"),
    "429 with a wait": lambda h: h.fail(429, "slow down", [("Retry-After", "0.2")]),
    "500": lambda h: h.fail(500, "oops"),
    "503 without JSON": lambda h: h.send(503, b"<html>busy</html>"),
    "408": lambda h: h.fail(408, "too slow"),
    "broken JSON": lambda h: h.send(200, b'{"choices": [{"mess'),
    "no JSON": lambda h: h.send(200, b"<html>hello</html>"),
    "a list": lambda h: h.send(200, []),
    "empty choices": lambda h: h.send(200, {"choices": []}),
    "no message": lambda h: h.send(200, {"choices": [{}]}),
    "an error that says 200": lambda h: h.send(200, {"error": {"message": "upstream"}}),
    "an error midway": lambda h: h.answer("half of it", finish="error"),
    "cut body": cut_body,
    "reset": reset,
    "slow": lambda h: time.sleep(1.0),
}


@pytest.mark.parametrize("trouble", PASSING)
def test_what_passes_is_tried_again(server, tmp_path, trouble):
    def act(handler, request, text, count):
        if count < 2:
            PASSING[trouble](handler)
        else:
            handler.answer("fine")

    server.act = act
    endpoint = client(server, timeout=0.3)
    start = time.monotonic()
    assert endpoint.complete(say("a"), cache=tmp_path) == [Reply("fine", "stop", 7, 3)]
    assert len(server.texts) == 3
    assert (endpoint.account.sent, endpoint.account.retries, endpoint.account.failed) == (3, 2, 0)
    assert trouble != "429 with a wait" or 0.4 <= time.monotonic() - start < 2


def test_a_dripping_reply_ends_at_the_timeout(server):
    def act(handler, request, text, count):
        if count:
            return handler.answer("fine")
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        for _ in range(20):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.1)

    server.act = act
    start = time.monotonic()
    assert client(server, timeout=0.4).complete(say("a"))[0].text == "fine"
    assert time.monotonic() - start < 1.5


@pytest.mark.parametrize("date", [False, True])
def test_retry_after_stops_all_requests(server, date):
    began = time.monotonic()

    def act(handler, request, text, count):
        if len(server.texts) == 1:
            wait = email.utils.formatdate(time.time() + 2, usegmt=True) if date else "0.5"
            handler.fail(429, "slow down", [("Retry-After", wait)])
        else:
            handler.answer("fine")

    server.act = act
    replies = client(server, concurrency=1).complete(say("a", "b", "c"))
    assert [r.text for r in replies] == ["fine"] * 3
    assert server.times[1] - server.times[0] > 0.5
    assert time.monotonic() - began < 5
    server.act = lambda h, *rest: h.fail(429, "come back", [("Retry-After", "86400")])
    with pytest.raises(SteerableError, match="asks to wait 86400 s"):
        client(server).complete(say("d"))


def test_waits_grow(server):
    server.act = lambda handler, request, text, count: PASSING["500"](handler) if count < 5 else handler.answer("x")
    client(server, backoff=0.04).complete(say("a"))
    gaps = [b - a for a, b in zip(server.times, server.times[1:], strict=False)]
    for k, gap in enumerate(gaps):
        assert 0.75 * 0.04 * 2**k <= gap <= 1.25 * 0.04 * 2**k + 0.3


def test_a_server_that_always_fails_is_one_sentence(server, tmp_path):
    server.act = lambda handler, *rest: handler.fail(500, "out of order")
    with pytest.raises(SteerableError, match=r"failed 3 times in a row.*500: out of order"):
        client(server, tries=3).complete(say(*"abcdefgh"), cache=tmp_path)
    assert not list(tmp_path.rglob("*.json"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(SteerableError, match="the connection failed"):
        Endpoint("m", url, tries=2, backoff=0.01).complete(say("a"))


def test_one_bad_request_does_not_stop_the_others(server, tmp_path):
    def act(handler, request, text, count):
        if text == "poison":
            handler.fail(500, "assertion failed")
        elif text == "long":
            handler.fail(400, "'max_tokens' is too large: the maximum context length is 100", param="max_tokens")
        else:
            time.sleep(0.02)
            echo(handler, request, text, count)

    server.act = act
    endpoint = client(server, tries=3, concurrency=2)
    replies = endpoint.complete(say("poison", "long", *"abcdefgh"), cache=tmp_path, max_tokens=5)
    assert [r.text for r in replies[2:]] == list("ABCDEFGH")
    assert replies[0].finish == replies[1].finish == "error"
    assert "3 tries failed" in replies[0].error and "assertion failed" in replies[0].error
    assert "400" in replies[1].error and "context length" in replies[1].error
    assert server.texts.count("long") == 2  # the second time without a longest reply
    assert tally(replies)["failed"] == endpoint.account.failed == 2
    asked = len(server.texts)
    endpoint.complete(say("long", *"abcdefgh"), cache=tmp_path, max_tokens=5)
    assert len(server.texts) == asked + 2  # failures are not kept


@pytest.mark.parametrize(
    ("status", "more", "kind", "sentence"),
    [
        (401, {}, UsageError, "refused the key"),
        (403, {}, UsageError, "refused the key"),
        (404, {}, UsageError, "knows no model 'm'"),
        (402, {}, SteerableError, "used up"),
        (429, {"code": "insufficient_quota"}, SteerableError, "used up"),
    ],
)
def test_what_concerns_all_requests_stops_at_once(server, monkeypatch, status, more, kind, sentence):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.act = lambda handler, *rest: handler.fail(status, f"no entry with {KEY}", **more)
    with pytest.raises(kind, match=sentence) as caught:
        client(server, concurrency=1).complete(say("a", "b", "c"))
    assert server.texts == ["a"]
    assert KEY not in str(caught.value) and "no entry with ***" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_newer_models_refuse_settings(server, tmp_path):
    def act(handler, request, text, count):
        for name in ("max_tokens", "temperature"):
            if name in request:
                code = {"code": "unsupported_parameter", "param": name}
                return handler.fail(400, f"Unsupported parameter: '{name}' is not supported with this model.", **code)
        echo(handler, request, text, count)

    server.act = act
    endpoint = client(server, concurrency=4)
    with pytest.warns(SteerableWarning) as told:
        replies = endpoint.complete(say(*"abcdefgh"), cache=tmp_path, temperature=0.0, max_tokens=8)
    assert [r.text for r in replies] == list("ABCDEFGH")
    assert sorted(str(w.message) for w in told) == [
        "m does not take max_tokens: max_completion_tokens is sent instead",
        "m does not take temperature: it is left out",
    ]
    asked = len(server.texts)
    assert server.requests[-1]["max_completion_tokens"] == 8
    assert endpoint.account.retries == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        endpoint.complete(say("i"), cache=tmp_path, temperature=0.0, max_tokens=8)  # it has learnt
        client(server).complete(say(*"abcdefgh"), cache=tmp_path, temperature=0.0, max_tokens=8)  # all kept
    assert len(server.texts) == asked + 1
    kept = json.loads(next(tmp_path.rglob("*.json")).read_text())
    assert kept["sent"] == {"model": "m", "max_completion_tokens": 8}  # what was really sent
    server.act = lambda handler, *rest: handler.fail(422, "extra fields: seed, max_tokens, max_completion_tokens")
    with pytest.warns(SteerableWarning):
        [reply] = client(server).complete(say("j"), max_tokens=8, seed=1)  # and one that refuses everything
    assert reply.error.startswith("422")


@pytest.mark.parametrize(
    "refusal",
    [
        "'max_tokens' or 'max_completion_tokens' is too large: 8192. This model's maximum context length is 4096",
        "This model's maximum context length is 4096 tokens. However, you requested 9303 tokens (1111 in the messages, "
        "8192 in the completion). Please reduce the length of the messages or completion.",
        "max_tokens=8192 cannot be greater than max_model_len=4096. Please request fewer output tokens.",
    ],
)
def test_a_model_that_reads_less_than_the_longest_reply_is_not_told_it(server, refusal):
    """What servers of short models say (several releases of vLLM, OpenAI)."""

    def act(handler, request, text, count):
        (echo if "max_tokens" not in request else lambda *_: handler.fail(400, refusal))(handler, request, text, count)

    server.act = act
    replies = client(server).complete(say("a", "b"), max_tokens=8192, temperature=0.0)
    assert [(r.text, r.error) for r in replies] == [("A", None), ("B", None)] and "temperature" in server.requests[-1]


def test_cut_and_empty_replies_are_told_apart(server, tmp_path):
    def act(handler, request, text, count):
        if text == "cut":
            handler.answer("half a", finish="length")
        elif text == "parts":  # as servers of reasoning models write content
            handler.answer([{"type": "thinking", "thinking": []}, {"type": "text", "text": "whole"}])
        else:
            handler.answer(None)

    server.act = act
    for _ in range(2):
        cut, empty, parts = client(server).complete(say("cut", "empty", "parts"), cache=tmp_path)
        assert cut.truncated and cut.text == "half a" and tally([cut])["truncated"] == 1
        assert (empty.text, empty.truncated, empty.error) == ("", False, None)
        assert parts.text == "whole"
    assert len(server.texts) == 3


def test_resuming_asks_only_for_what_is_missing(server, tmp_path):
    def act(handler, request, text, count):
        if len(server.texts) > 5:
            return handler.fail(401, "expired")
        echo(handler, request, text, count)

    server.act = act
    texts = [f"t{k}" for k in range(12)]
    with pytest.raises(UsageError):
        client(server, concurrency=1).complete(say(*texts), cache=tmp_path)
    server.act = echo
    server.texts.clear()
    endpoint = client(server)
    assert [r.text for r in endpoint.complete(say(*texts), cache=tmp_path)] == [t.upper() for t in texts]
    assert sorted(server.texts) == sorted(texts[5:])
    assert endpoint.account.cached == 5


def test_damaged_cache_files_are_asked_again(server, tmp_path):
    endpoint = client(server)
    endpoint.complete(say("a"), cache=tmp_path)
    [file] = tmp_path.rglob("*.json")
    whole = file.read_bytes()
    for damage in (
        b"",
        whole[:30],
        b"[]",
        b'{"reply": {"text": 3}}',
        b'{"reply": {"text": "x", "prompt_tokens": "y"}}',
    ):
        file.write_bytes(damage)
        assert endpoint.complete(say("a"), cache=tmp_path)[0].text == "A"
        assert file.read_bytes() == whole


SCRIPT = """
import signal
import sys
from pathlib import Path
from steerable.chains.endpoint import Endpoint
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell's children ignore it
conversations = [[{"role": "user", "content": f"t{k}"}] for k in range(40)]
replies = Endpoint("m", sys.argv[1], concurrency=2).complete(conversations, cache=Path(sys.argv[2]))
print(len(replies))
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_resumes(server, tmp_path, how):
    def act(handler, request, text, count):
        time.sleep(30 if text == "t20" and not count else 0.01)
        echo(handler, request, text, count)

    server.act = act
    command = [sys.executable, "-c", SCRIPT, server.url, str(tmp_path)]
    environment = {**os.environ, "STEERABLE_API_KEY": KEY}
    first = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while len(set(server.texts)) < 25:
        time.sleep(0.01)
        assert first.poll() is None
    first.send_signal(how)
    told = time.monotonic()
    _, errors = first.communicate(timeout=20)
    assert first.returncode != 0
    assert time.monotonic() - told < 8  # the slow request is not waited for
    assert KEY not in errors
    kept = {f.name for f in tmp_path.rglob("*.json")}
    assert 20 <= len(kept) < 40
    before = len(server.texts)
    second = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert second.stdout.strip() == "40", second.stderr
    assert len(server.texts) - before == 40 - len(kept)
    assert all(json.loads(f.read_text())["reply"]["text"].startswith("T") for f in tmp_path.rglob("*.json"))


def test_concurrency_is_bounded_and_used(server):
    five = Barrier(5)  # nobody is answered before five are there: a client that sends fewer at once gets no answer
    inside, most = 0, 0

    def act(handler, request, text, count):
        nonlocal inside, most
        with server.lock:
            inside += 1
            most = max(most, inside)
        five.wait(timeout=30)
        with server.lock:
            inside -= 1  # before the answer: the next request may come as soon as that is read
        echo(handler, request, text, count)

    server.act = act
    client(server, concurrency=5, timeout=60.0, tries=1).complete(say(*map(str, range(30))))
    assert len(server.texts) == 30 and most == 5


def test_requests_per_minute(server):
    client(server, concurrency=8, requests_per_minute=1200).complete(say(*map(str, range(20))))
    times = sorted(server.times)
    assert len(times) == 20
    assert times[-1] - times[0] >= 0.8 * 19 * 0.05
    # In any window of half a second at most the ten that are due, and two for what the clock and threads add.
    assert max(sum(t <= u < t + 0.5 for u in times) for t in times) <= 12


def test_tokens_per_minute(server):
    endpoint = client(server, concurrency=8, tokens_per_minute=6000)  # 10 tokens each take 0.1 s
    endpoint.complete(say(*map(str, range(10))), max_tokens=10)
    assert 0.7 <= max(server.times) - min(server.times) < 3


def test_no_key_is_needed_for_a_server_of_ones_own(server, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    assert Endpoint("m").complete(say("a"))[0].text == "A"
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    Endpoint("m").complete(say("b"))
    monkeypatch.setenv("STEERABLE_API_KEY", KEY + "2")
    Endpoint("m").complete(say("c"))
    assert server.keys == {"Bearer none", f"Bearer {KEY}", f"Bearer {KEY}2"}
    monkeypatch.delenv("OPENAI_BASE_URL")
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.delenv("STEERABLE_API_KEY")
    with pytest.raises(UsageError, match="no key for OpenAI"):
        Endpoint("m").complete(say("a"))
    monkeypatch.setenv("OPENAI_API_KEY", "b\u00e4d")
    with pytest.raises(UsageError, match="characters that no key has"):
        Endpoint("m", server.url).complete(say("d"))


def test_the_key_is_nowhere(server, tmp_path, monkeypatch, capfd, caplog):
    """Not in files, output, logs at the finest level, representations or errors; also where the server repeats it."""
    monkeypatch.setenv("STEERABLE_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)

    def act(handler, request, text, count):
        if text == "fail":
            return handler.fail(400, f"bad request with {handler.headers['Authorization']}")
        if text == "flaky" and not count:
            return handler.send(200, {"error": {"message": f"upstream refused {KEY}"}})
        handler.answer(f"your key is {KEY}")

    server.act = act
    told = []
    for secret in (server.url.replace("127.0.0.1", f"user:{KEY}@127.0.0.1"), f"{server.url}?key={KEY}"):
        with pytest.raises(UsageError, match="must hold no user, password or query") as refused:
            Endpoint("m", secret)
        told.append(str(refused.value))
    endpoint = client(server)
    told += map(str, endpoint.complete(say("a", "flaky", "fail"), cache=tmp_path))
    told += [repr(endpoint), endpoint.host, str(endpoint.account), repr(vars(endpoint))]
    server.act = lambda handler, *rest: handler.fail(500, f"broken by {KEY}")
    with pytest.raises(SteerableError) as caught:
        client(server, tries=2).complete(say("b"), cache=tmp_path)
    told += [str(caught.value), repr(caught.value.__cause__), repr(caught.value.__context__)]
    told += [*capfd.readouterr(), caplog.text, *(f.read_text() for f in tmp_path.rglob("*.json"))]
    assert "your key is ***" in "".join(told)
    assert all(KEY not in text for text in told)


def test_inside_a_running_event_loop(server):
    import asyncio

    async def notebook():
        return client(server).complete(say("a"))

    assert asyncio.run(notebook())[0].text == "A"


def test_what_the_callback_raises_stops_the_call(server):
    def finished(index, reply):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        client(server).complete(say("a", "b"), finished=finished)


def test_text_that_has_no_utf8_form_is_sent(server):
    [reply] = client(server).complete(say("lone \ud83d, pair \ud83d\ude00"))
    assert reply.text == "LONE \ufffd, PAIR \U0001f600"


def test_wrong_options():
    for options in ({"concurrency": 0}, {"tries": 0}, {"timeout": 0}, {"requests_per_minute": 0}, {"backoff": -1}):
        with pytest.raises(UsageError):
            Endpoint("m", "http://x/v1", **options)
    with pytest.raises(UsageError, match="no server address"):
        Endpoint("m", "localhost:8000/v1")
    with pytest.raises(UsageError, match="name"):
        Endpoint("", "http://x/v1")
