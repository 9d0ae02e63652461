"""Annotation by a language model: rounds, splitting, losses and resuming, against a server on loopback; and vLLM."""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread

import pytest

from steerable.chains.annotators.llm import annotate, split
from steerable.chains.endpoint import Endpoint
from steerable.chains.records import LABELS
from steerable.store.errors import SteerableError

SENTENCE = "We know that {} is even, so half of it is whole."


def make_chain(k, sentences=3):
    text = "\n\n".join(SENTENCE.format(100 * k + i) + " Wait, is that so?" for i in range(sentences))
    return {"task_id": f"t{k}", "sample": 0, "thinking": f"  {text}\n", "answer": "", "closed": True, "tokens": 1}


def marked(text):
    """What a good annotator answers: sentences of `text`, labelled by what they are."""
    label = {"Wait": "uncertainty-estimation"}
    return "".join(
        f'["{label.get(s[:4], "deduction")}"]{s}["end-section"]\n' for s in re.findall(r"[A-Z][^.?]*[.?]", text)
    )


@pytest.fixture
def annotator():
    """A server whose `answer(text, prompt, count)` gives (reply, finish reason) to the text between the chain tags;
    `count` is how often that text came before."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = request["messages"][-1]["content"]
            text = prompt.rpartition("<chain>\n")[2].removesuffix("\n</chain>")
            with server.lock:
                count = sum(t == text for t, _ in server.asked)
                server.asked.append((text, prompt))
            reply, finish = server.answer(text, prompt, count)
            status = 400 if finish == "refused" else 200
            body = (
                {"error": {"message": reply}}
                if status == 400
                else {
                    "choices": [{"message": {"role": "assistant", "content": reply}, "finish_reason": finish}],
                    "usage": {"prompt_tokens": len(prompt), "completion_tokens": len(reply)},
                }
            )
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.lock = [], Lock()
    server.answer = lambda text, prompt, count: (marked(text), "stop")
    server.endpoint = Endpoint("judge", f"http://127.0.0.1:{server.server_port}/v1", backoff=0.01)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def pieces(chain, spans):
    return [(span["label"], chain["thinking"][span["start"] : span["end"]]) for span in spans]


def truth(chain):
    return [
        ("uncertainty-estimation" if s.startswith("Wait") else "deduction", s)
        for s in re.findall(r"[A-Z][^.?]*[.?]", chain["thinking"])
    ]


def test_chains_are_annotated_in_order(annotator, tmp_path):
    chains = [make_chain(k) for k in range(20)]
    seen = []
    found = annotate(chains, annotator.endpoint, cache=tmp_path, progress=lambda *done: seen.append(done))
    for chain, spans in zip(chains, found.spans, strict=True):
        assert pieces(chain, spans) == truth(chain)
        assert {(s["task_id"], s["sample"]) for s in spans} == {(chain["task_id"], 0)}
    assert found.account["annotated"] == found.account["pieces"] == found.account["usage"]["requests"] == 20
    assert found.account["failed"] == found.account["unplaced"] == found.account["asked_again"] == 0
    assert [sum(column) for column in zip(*seen, strict=True)] == [20, found.account["usage"]["completion_tokens"]]
    asked = len(annotator.asked)
    again = annotate(chains, annotator.endpoint, cache=tmp_path, prices=(1.0, 2.0))
    assert (again.spans, len(annotator.asked)) == (found.spans, asked)
    usage = again.account["usage"]
    assert usage.pop("cost") == pytest.approx((usage["prompt_tokens"] + 2 * usage["completion_tokens"]) / 1e6, abs=1e-6)
    assert again.account == found.account


def test_the_prompt_holds_the_chain_and_the_labels(annotator):
    annotate([make_chain(1)], annotator.endpoint, cache=None)
    [(text, prompt)] = annotator.asked
    assert text == make_chain(1)["thinking"].strip()
    assert all(f"- {label}: " in prompt for label in LABELS)


def test_labels_of_ones_own(annotator):
    """The model is told of these labels alone, and no other one is read."""
    labels = {"planning": "it says what comes next", "doing": "it carries out a step"}
    chain = make_chain(1) | {"thinking": "First I add the two. So 5 it is. It is 5."}
    words = {"planning": "First I add the two.", "deduction": "So 5 it is.", "doing": "It is 5."}
    answer = "".join(f'["{label}"]{text}["end-section"]' for label, text in words.items())
    annotator.answer = lambda text, prompt, count: (answer, "stop")
    found = annotate([chain], annotator.endpoint, labels=labels, cache=None)
    assert pieces(chain, found.spans[0]) == [("planning", words["planning"]), ("doing", words["doing"])]
    assert found.account["unknown_labels"] == {"deduction": 1}
    (_, prompt), *_ = annotator.asked
    assert "- planning: it says what comes next\n- doing: it carries out a step\n" in prompt
    assert "these 2 labels" in prompt and not any(label in prompt for label in LABELS)


def test_long_chains_are_split_and_joined(annotator):
    chain = make_chain(1, sentences=40)
    found = annotate([chain], annotator.endpoint, cache=None, piece=500)
    assert pieces(chain, found.spans[0]) == truth(chain)
    assert found.account["pieces"] == len(annotator.asked) > 5
    assert all(len(text) <= 500 for text, _ in annotator.asked)
    later = [prompt for text, prompt in annotator.asked if not text.startswith(SENTENCE.format(100))]
    assert all("of a longer chain" in prompt and "<before>" in prompt for prompt in later)


@pytest.mark.parametrize("size", [7, 40, 100, 333, 5000])
def test_split_loses_and_repeats_nothing(size):
    for text in (make_chain(1, 9)["thinking"], "x" * 500, " \n ", "", "a b\n\n\nc " * 100, "数列。" * 200):
        ranges = split(text, size)
        assert all(0 < end - start <= size for start, end in ranges)
        assert all(text[a:b] == text[a:b].strip() for a, b in ranges)
        assert "".join("".join(text[a:b].split()) for a, b in ranges) == "".join(text.split())
        assert all(b <= c for (_, b), (c, _) in zip(ranges, ranges[1:], strict=False))
    whole = make_chain(1, 9)["thinking"]
    assert all(whole[a:b].startswith("We") for a, b in split(whole, 333))  # at paragraphs


def test_a_wrong_form_is_asked_again_with_the_reason(annotator, tmp_path):
    def answer(text, prompt, count):
        return [("Sorry, what?", "stop"), ('["musing"]' + text + '["end-section"]', "stop"), (marked(text), "stop")][
            count
        ]

    annotator.answer = answer
    chain = make_chain(1)
    found = annotate([chain], annotator.endpoint, cache=tmp_path)
    assert pieces(chain, found.spans[0]) == truth(chain)
    assert found.account["asked_again"] == 2
    assert [("could not be used" in prompt) for _, prompt in annotator.asked] == [False, True, True]
    assert annotate([chain], annotator.endpoint, cache=tmp_path).spans == found.spans
    assert len(annotator.asked) == 3


def test_a_chain_that_stays_unread_is_none_and_counted(annotator, tmp_path):
    chains = [make_chain(1), make_chain(2), {**make_chain(3), "thinking": " \n"}]
    annotator.answer = lambda text, prompt, count: ("no marks" if "We know that 200" in text else marked(text), "stop")
    seen = []
    found = annotate(chains, annotator.endpoint, cache=tmp_path, progress=lambda *done: seen.append(done))
    assert found.spans[0] and found.spans[1] is None and found.spans[2] == []
    account = {key: found.account[key] for key in ("chains", "annotated", "failed", "blank", "asked_again")}
    assert account == {"chains": 3, "annotated": 1, "failed": 1, "blank": 1, "asked_again": 2}
    assert sum(chains for chains, _ in seen) == 3
    asked = len(annotator.asked)
    assert annotate(chains, annotator.endpoint, cache=tmp_path).account == found.account
    assert len(annotator.asked) == asked == 4


def test_a_cut_reply_is_asked_again_in_halves(annotator):
    annotator.answer = lambda text, prompt, count: (
        marked(text)[:2000],
        "length" if len(marked(text)) > 2000 else "stop",
    )
    chain = make_chain(1, sentences=30)
    found = annotate([chain], annotator.endpoint, cache=None)
    assert pieces(chain, found.spans[0]) == truth(chain)
    assert found.account["usage"]["truncated"] > 0
    assert found.account["pieces"] == 1
    annotator.answer = lambda text, prompt, count: (marked(text), "length")
    assert annotate([chain], annotator.endpoint, cache=None).spans == [None]


def test_losses_are_counted(annotator):
    chain = make_chain(1, sentences=4)

    def answer(text, prompt, count):
        marks = marked(text).replace("uncertainty-estimation", "musing", 1)
        return marks.replace("We know that 103 is even", "We see: 103 seems odd"), "stop"

    annotator.answer = answer
    found = annotate([chain], annotator.endpoint, cache=None)
    account = {key: found.account[key] for key in ("segments", "unplaced", "unknown_labels")}
    assert account == {"segments": 7, "unplaced": 1, "unknown_labels": {"musing": 1}}
    assert found.account["unplaced_characters"] > 20
    assert pieces(chain, found.spans[0]) == [truth(chain)[k] for k in (0, 2, 3, 4, 5, 7)]


def test_a_refused_request_costs_its_chain_only(annotator):
    def answer(text, prompt, count):
        if "We know that 200" in text:
            return "This model's maximum context length is 9 tokens, and your messages have 10.", "refused"
        return marked(text), "stop"

    annotator.answer = answer
    found = annotate([make_chain(1), make_chain(2)], annotator.endpoint, cache=None)
    assert found.spans[0] and found.spans[1] is None
    assert found.account["failed"] == 1
    [error] = found.account["errors"]
    assert "maximum context length" in error
    annotator.answer = lambda text, prompt, count: ("too long", "refused")
    with pytest.raises(SteerableError, match="no chain could be annotated: 400: too long"):
        annotate([make_chain(1)], annotator.endpoint, cache=None)


@pytest.fixture
def served():
    """The bundled model behind a vLLM server: its address."""
    pytest.importorskip("vllm")
    from steerable.models.sources import pocket_path

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(pocket_path())]
    command += ["--served-model-name", "pocket", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--enforce-eager", "--max-model-len", "1024", "--dtype", "float32"]
    cpu = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    server = subprocess.Popen(
        command, env={**os.environ, **cpu, "HF_HUB_OFFLINE": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                assert server.poll() is None, "the server did not start"
                time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(60)


def test_a_really_served_model(served, tmp_path, monkeypatch):
    """The bundled model cannot annotate, but it answers: usage is counted, cut replies are seen, all chains fail."""
    endpoint = Endpoint("pocket", served, timeout=120)
    messages = [[{"role": "user", "content": f"Compute {k} + 1."}] for k in range(5)]
    replies = endpoint.complete(messages, cache=tmp_path / "a", temperature=0.0, max_tokens=4)
    assert all(reply.truncated and reply.completion_tokens == 4 and reply.prompt_tokens > 0 for reply in replies)
    sent = endpoint.account.sent
    assert endpoint.complete(messages, cache=tmp_path / "a", temperature=0.0, max_tokens=4) == replies
    assert endpoint.account.sent == sent == 5
    chains = [make_chain(k, 1) for k in range(3)]
    with pytest.raises(SteerableError, match="no chain could be annotated: 400: .*context"):
        annotate([make_chain(1, 100)], endpoint, cache=None, max_tokens=50)
    monkeypatch.setattr("steerable.chains.annotators.llm.PROMPT", "Label this.")  # the true one fills its context
    for longest in (20, 500):
        found = annotate(chains, endpoint, cache=tmp_path / "b", max_tokens=longest)
        assert found.spans == [None, None, None]
        assert (found.account["failed"], found.account["errors"]) == (3, {})
        usage = found.account["usage"]
        assert usage["requests"] == 9 and usage["prompt_tokens"] > 0
        assert usage["truncated"] == 9 if longest == 20 else usage["truncated"] < 9
    with pytest.raises(SteerableError, match="knows no model 'other'"):
        Endpoint("other", served).complete(messages[:1])
    long = endpoint.complete([*messages[:1], [{"role": "user", "content": "1 + " * 2000}]], max_tokens=4)
    assert long[0].error is None
    assert "context" in str(long[1].error)
    assert not list(Path(tmp_path).rglob("*.tmp"))
