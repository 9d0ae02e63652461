"""Tasks written by a model, over a real HTTP server that speaks the chat-completions protocol."""

import json
import random
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from steerable.chains.duplicates import shingles, similarity, task_key
from steerable.chains.endpoint import Endpoint
from steerable.chains.tasks import make_splits, make_tasks
from steerable.chains.written import ABOUT, ROUNDS, _prompt
from steerable.store.errors import SteerableError, UsageError

WORDS = [a + b + c for a in "bdfghjklmnprst" for b in "aeiou" for c in ("rk", "nt", "lm", "st")]


def invent(rng):
    """A task of its own words."""
    some = rng.sample(WORDS, 12)
    return f"The {' '.join(some[:6])} and the {' '.join(some[6:])} are mixed. What comes out of it?"


class Writer:
    """What the server answers: as many tasks as were asked for, some of them known already, in changing forms."""

    def __init__(self):
        self.prompts = []
        self.known = []
        self.style = "mixed"
        self.lock = threading.Lock()

    def __call__(self, request):
        prompt = request["messages"][-1]["content"]
        n = int(re.search(r"Write (\d+) different", prompt)[1])
        rng = random.Random(f"{request['seed']} {prompt}")
        tasks = [invent(rng) for _ in range(n)]
        if n > 2:
            tasks[1] = " 7. " + tasks[0].upper()  # the same in another spelling
            tasks[2] = tasks[0].replace("mixed", "mixed 3 times").replace("What", "So what")  # nearly the same
        with self.lock:
            self.prompts.append(prompt)
            if self.known:  # a task of another request
                tasks[-1] = self.known[0]
            else:
                self.known.append(tasks[0])
        if self.style == "refuses":
            return "I cannot help with that."
        if self.style == "repeats":
            return json.dumps([self.known[0]] * n)
        form = rng.choice(["json", "fenced", "numbered", "cut"])
        if form == "json":
            return json.dumps([{"task": task, "answer": "42"} for task in tasks])
        if form == "fenced":
            return "Here are the tasks:\n```json\n" + json.dumps(tasks, indent=2) + "\n```\nHave fun!"
        if form == "cut":
            return json.dumps(tasks)[:-20]
        return "Sure!\n\n" + "\n\n".join(f"**{i}.** {task}" for i, task in enumerate(tasks, 1)) + "\n\nLet me know!"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("STEERABLE_API_KEY", "sk-a-secret")
    writer = Writer()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = writer(request)
            body = json.dumps(
                {
                    "id": "x",
                    "object": "chat.completion",
                    "created": 0,
                    "model": request["model"],
                    "choices": [
                        {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
                    ],
                    "usage": {"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 30},
                }
            ).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, args=(0.05,))
    thread.start()
    writer.url = f"http://127.0.0.1:{http.server_port}/v1"
    yield writer
    http.shutdown()
    http.server_close()
    thread.join()


def test_ten_categories_balanced_disjoint_and_nothing_alike(server):
    tasks = make_splits(f"llm:writer@{server.url}", {"extraction": 100, "evaluation": 25}, seed=1)
    counts = Counter((task["split"], task["category"]) for task in tasks)
    assert {category for _, category in counts} == set(ABOUT)
    assert {counts["extraction", category] for category in ABOUT} == {10}
    assert {counts["evaluation", category] for category in ABOUT} == {2, 3}
    assert len({task["id"] for task in tasks}) == len({task_key(task["prompt"]) for task in tasks}) == 125
    looks = [shingles(task["prompt"]) for task in tasks]
    assert max(similarity(a, b) for i, a in enumerate(looks) for b in looks[:i]) < 0.6
    assert all(task["source"] == "llm:writer" and "answer" not in task for task in tasks)
    assert not any("42" in task["prompt"] or task["prompt"][:1].isdigit() for task in tasks)


@pytest.mark.slow
def test_the_cache_gives_the_same_tasks_without_asking_and_holds_no_key(server, tmp_path):
    source = f"llm:writer@{server.url}"
    server.known.append("x y")  # from here on, what is answered depends on the request alone
    first = make_tasks(source, 30, cache=tmp_path / "replies")
    asked = len(server.prompts)
    assert asked >= 10
    assert make_tasks(source, 30, cache=tmp_path / "replies") == first and len(server.prompts) == asked
    assert not any(b"sk-a-secret" in file.read_bytes() for file in tmp_path.rglob("*.json"))
    # A killed run left a part of the replies: only the others are asked for.
    kept = sorted((tmp_path / "replies").rglob("*.json"))
    for file in kept[::2]:
        file.unlink()
    assert make_tasks(source, 30, cache=tmp_path / "replies") == first
    assert len(server.prompts) - asked == len(kept[::2])
    assert make_tasks(source, 30, seed=5) != first


def test_later_requests_name_what_is_there_and_ask_only_for_what_is_missing(server):
    make_tasks(f"llm:writer@{server.url}", 50)
    later = [prompt for prompt in server.prompts if "These exist already" in prompt]
    first = [prompt for prompt in server.prompts if "These exist already" not in prompt]
    assert len(first) == 10 and 0 < len(later) < ROUNDS * 10
    assert all(prompt.count("\n- ") > 5 for prompt in later)


def test_excluded_tasks_and_an_endpoint_of_ones_own(server):
    endpoint = Endpoint("writer", server.url, concurrency=2)
    first = make_tasks("llm", 10, endpoint=endpoint)
    assert endpoint.account.sent >= 10
    hashes = {task_key(task["prompt"]) for task in first}
    again = make_tasks("llm", 10, 0, hashes, endpoint=endpoint)
    assert not hashes & {task_key(task["prompt"]) for task in again}


@pytest.mark.slow
@pytest.mark.parametrize("style", ["refuses", "repeats"])
def test_a_model_that_writes_too_little_is_asked_a_bounded_number_of_times(server, style):
    server.style = style
    with pytest.raises(
        SteerableError, match=r"writer wrote only [01] different tasks of 10 in [34] rounds, too few of"
    ):
        make_tasks(f"llm:writer@{server.url}", 10)
    assert len(server.prompts) <= 4 * 10


def test_sources_that_name_no_model():
    for source in ("llm", "llm:", "llm:@http://localhost:1/v1"):
        with pytest.raises(UsageError, match="names no model"):
            make_tasks(source, 5)


def test_the_prompt_says_what_a_task_must_be():
    prompt = _prompt("Causal Reasoning", 7, 3, ["An old\ntask?"])
    assert "Write 7 different tasks" in prompt and ABOUT["Causal Reasoning"] in prompt and "- An old task?" in prompt
