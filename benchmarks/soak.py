"""A soak of `steerable serve`: many clients at once, of all kinds, while directions are replaced.

    python benchmarks/soak.py                       # 64 clients for 300 seconds
    python benchmarks/soak.py --quick               # 4 clients for 15 seconds, an eager server

Clients send steered requests (by name, by the model's name, with vectors, with gates and a map), unsteered ones, ones
that are wrong, and ones that they leave before the answer is whole. Every answer is held against the transformers
engine: the log-probability of each of its tokens under the steering that was asked for. Where a direction was replaced
while a request was under way, the versions that it may have met are those between its sending and its answer.

At the end every slot must be usable (as many requests as run at once, each steered otherwise), nothing may run or wait,
and after `kill -9` and another start the directions must be there, byte for byte. Ends with 1 where anything is wrong;
`benchmarks/results/soak.json` has what was counted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from rich.console import Console
from rich.table import Table

import steerable as st
from steerable.engines.activations import mean_norms
from steerable.engines.base import Continuation
from steerable.engines.transformers import TransformersEngine
from steerable.engines.vllm.requests import read_steering
from steerable.models.loading import n_layers, short_name
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.steering.spec import Steering
from steerable.steering.text import parse_steering
from steerable.store.run_folder import write_json

RESULTS = Path(__file__).parent / "results" / "soak.json"
QUESTIONS = (
    "How many legs do 3 cats have?",
    "Solve for x: 2*x + 3 = 9",
    "State the sum of 3 + 4 - 2.",
    "Name a colour.",
)
NAMES = tuple(f"d{n}" for n in range(8))
VERSIONS = 4  # of each direction, in turn
FORMS = ("{s} {name}", "{s} {name}@generated", "{s} {name}@prompt", "{s} {name}|ablate", "{s} {name}@positions(2, 40)")
STRENGTHS = (0.5, -0.5, 1.0)
TOLERANCE = 1e-4  # of log-probabilities; what the steerings change is a hundred times more
TOKENS = 24


@dataclass
class Answer:
    """One that has to be checked. sent, came: when, in seconds."""

    prompt: tuple[int, ...]
    text: str  # of the steering; empty: none
    name: str
    tokens: tuple[int, ...]
    scores: tuple[float, ...]
    sent: float
    came: float


class Server:
    """A process of `steerable serve`, and those that it starts."""

    def __init__(self, model: str, folder: Path, clients: int, is_eager: bool) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "steerable", "serve", model, "--port", str(self.port)]
        command += ["--directions", str(folder / "directions"), "--"]
        command += ["--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", str(clients)]
        command += ["--gpu-memory-utilization", "0.1", *(["--enforce-eager"] if is_eager else [])]
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
        self.log = folder / "server.log"
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=log)
        self.url = f"http://127.0.0.1:{self.port}"
        while True:
            try:
                httpx.get(f"{self.url}/health", timeout=1)
                break
            except httpx.HTTPError:
                if self.process.poll() is not None:
                    raise SystemExit(f"the server did not start: {self.log.read_text()[-3000:]}") from None
                time.sleep(1)

    def memory(self) -> int:
        """Resident bytes of all its processes."""
        process = psutil.Process(self.process.pid)
        return sum(one.memory_info().rss for one in [process, *process.children(recursive=True)])

    def kill(self) -> int:
        """`kill -9` of the server; how many of its processes are left after a minute (these are ended then)."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        self.process.wait()
        _, left = psutil.wait_procs(children, timeout=60)
        for one in left:
            one.kill()
        return len(left)


@dataclass
class Soak:
    """The clients of one server, and what came of their requests."""

    client: httpx.AsyncClient
    model: str
    width: int
    prompts: list[tuple[int, ...]]
    bodies: dict[tuple[str, int], bytes]  # direction files by name and version
    until: float
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    puts: dict[str, list[tuple[float, float, int]]] = field(default_factory=dict)  # began, ended, version

    async def put(self, name: str, version: int) -> None:
        """Replace a direction."""
        began = time.monotonic()
        answer = await self.client.put(f"/v1/steering/directions/{name}", content=self.bodies[name, version])
        self.expect(answer, 200, 201)
        self.puts.setdefault(name, []).append((began, time.monotonic(), version))
        self.counts["replaced"] += 1

    async def replace(self, rng: random.Random) -> None:
        """Replace one direction after another."""
        while time.monotonic() < self.until:
            name = rng.choice(NAMES)
            await self.put(name, (self.puts[name][-1][2] + 1) % VERSIONS)
            await asyncio.sleep(0.1)

    async def one_client(self, rng: random.Random) -> None:
        """One request after another."""
        kinds = [self.steered, self.steered, self.preset, self.plain, self.bad, self.left]
        while time.monotonic() < self.until:
            await rng.choice(kinds)(rng)

    async def steered(self, rng: random.Random) -> None:
        name = rng.choice(NAMES)
        text = rng.choice(FORMS).format(s=rng.choice(STRENGTHS), name=name)
        await self.ask(rng, "steered", text, name, vllm_xargs={"steering": text})

    async def preset(self, rng: random.Random) -> None:
        name = rng.choice(NAMES)
        await self.ask(rng, "by the model's name", f"1.0 {name}", name, model=f"{self.model}:{name}")

    async def own_vectors(self, rng: random.Random, layers: int) -> None:
        """A steering that no other request has."""
        layer, vector = rng.randrange(layers), [round(rng.gauss(0, 0.2), 3) for _ in range(self.width)]
        text = json.dumps({"vectors": {str(layer): vector}})
        await self.ask(rng, "each with its own vectors", text, "", vllm_xargs={"steering": text})

    async def plain(self, rng: random.Random) -> None:
        await self.ask(rng, "unsteered", "", "")

    async def ask(self, rng: random.Random, kind: str, text: str, name: str, **more: Any) -> None:
        prompt, sent = rng.choice(self.prompts), time.monotonic()
        answer = await self.client.post("/v1/completions", json=self.body(prompt, **more))
        if self.expect(answer, 200):
            choice = answer.json()["choices"][0]
            tokens, scores = tuple(choice["token_ids"]), tuple(choice["logprobs"]["token_logprobs"])
            self.answers.append(Answer(prompt, text, name, tokens, scores, sent, time.monotonic()))
            self.counts[kind] += 1

    async def bad(self, rng: random.Random) -> None:
        """A request that must be refused, with the right status."""
        steering, status = rng.choice(
            [("0.5 nobody", 400), ("0.5", 400), ('{"vectors": {"2": [1, 2]}}', 400), ('[{"direction": "d0",', 400),
             ('{"direction": "d0", "strenght": 1}', 400), ("1 d0[99]", 400), (None, 404)]
        )  # fmt: skip
        more = {"model": f"{self.model}:nobody"} if steering is None else {"vllm_xargs": {"steering": steering}}
        answer = await self.client.post("/v1/completions", json=self.body(self.prompts[0], **more))
        self.expect(answer, status)
        self.counts["refused"] += 1

    async def left(self, rng: random.Random) -> None:
        """A stream that its client leaves after a few tokens."""
        text = f"{rng.choice(STRENGTHS)} {rng.choice(NAMES)}"
        content = self.body(rng.choice(self.prompts), stream=True, max_tokens=150, vllm_xargs={"steering": text})
        async with self.client.stream("POST", "/v1/completions", json=content) as answer:
            lines, enough = 0, rng.randrange(1, 8)
            async for _ in answer.aiter_lines():
                lines += 1
                if lines > enough:
                    break
        self.counts["left by the client"] += 1

    def body(self, prompt: tuple[int, ...], **more: Any) -> dict[str, Any]:
        return {
            "model": self.model, "prompt": list(prompt), "max_tokens": TOKENS, "temperature": 0, "logprobs": 0,
            "ignore_eos": True, "return_token_ids": True, **more,
        }  # fmt: skip

    def expect(self, answer: httpx.Response, *statuses: int) -> bool:
        if answer.status_code not in statuses:
            self.wrong.append(f"{answer.status_code} instead of {statuses}: {answer.text[:200]}")
        return answer.status_code in statuses

    def versions(self, answer: Answer) -> set[int]:
        """Versions of the direction that the answer may have been given with."""
        puts = self.puts.get(answer.name, [(0.0, 0.0, 0)])
        ends = [ended for _, ended, _ in puts[1:]] + [float("inf")]
        return {
            version for (began, _, version), end in zip(puts, ends, strict=True)
            if began <= answer.came and end >= answer.sent
        }  # fmt: skip


def check(soak: Soak, reference: TransformersEngine, directions: dict[tuple[str, int], Direction]) -> float:
    """Hold every answer against the other engine; the largest difference. Those that are wrong are told."""

    def steering(text: str, version: int) -> Steering:
        if text.startswith("{"):
            return read_steering(text)
        return tuple(parse_steering(text, lambda name: directions[name, version])) if text else ()

    allowed = [(answer, soak.versions(answer)) for answer in soak.answers]
    keys = sorted({(a.prompt, a.text, a.tokens, version) for a, versions in allowed for version in versions})
    texts = [Continuation(prompt, list(tokens), steering(text, v)) for prompt, text, tokens, v in keys]
    expected = dict(zip(keys, reference.logprobs(texts), strict=True))
    largest = 0.0
    for a, versions in allowed:
        scores = torch.tensor(a.scores)
        gaps = [float((scores - expected[a.prompt, a.text, a.tokens, v]).abs().max()) for v in versions]
        largest = max(largest, min(gaps))
        if min(gaps) > TOLERANCE:
            soak.wrong.append(f"{a.text or 'unsteered'}: log-probabilities are off by {min(gaps):.2g}")
    return largest


def metric(server: Server, name: str) -> float:
    text = httpx.get(f"{server.url}/metrics", timeout=60).text
    return sum(float(value) for value in re.findall(rf"(?m)^{name}(?:{{.*}})? (\S+)$", text))


async def watched(server: Server, seconds: float) -> list[int]:
    """What the server holds of memory after each tenth of the time, in MiB: a leak goes on, a warm-up ends."""
    held = [server.memory() >> 20]
    for _ in range(10):
        await asyncio.sleep(seconds / 10)
        held.append(server.memory() >> 20)
    return held


async def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    model, tokenizer = st.load(arguments.model, dtype="float32")
    reference = TransformersEngine(model, tokenizer)
    prompts = [tuple(tokenizer(text)["input_ids"]) for text in QUESTIONS]
    sites = [Site("resid_post", layer) for layer in range(n_layers(model))]
    norms = mean_norms(model, prompts, sites)
    directions = {}
    for number, name in enumerate(NAMES):
        for version in range(VERSIONS):
            generator = torch.Generator().manual_seed(number * VERSIONS + version)
            vectors = {}
            for site in sites[number % 2 :: 2]:
                drawn = torch.randn(model.config.hidden_size, generator=generator)
                vectors[site] = drawn / torch.linalg.vector_norm(drawn) * norms[site] * 0.5
            directions[name, version] = Direction(vectors, behaviour=name)
    bodies = {key: direction.to_bytes() for key, direction in directions.items()}
    server = Server(arguments.model, folder, arguments.clients, arguments.eager)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=limits) as client:
        until, width = time.monotonic() + arguments.seconds, model.config.hidden_size
        soak = Soak(client, short_name(arguments.model), width, prompts, bodies, until)
        for name in NAMES:
            await soak.put(name, 0)
        began = time.monotonic()
        rngs = [random.Random(n) for n in range(arguments.clients + 1)]
        memory, *_ = await asyncio.gather(
            watched(server, arguments.seconds), soak.replace(rngs[-1]), *(soak.one_client(rng) for rng in rngs[:-1])
        )
        seconds = time.monotonic() - began
        # As many as run at once, with a slot for each: none was lost.
        await asyncio.gather(*(soak.own_vectors(rng, len(norms)) for rng in rngs[:-1]))
        workers = (await client.get("/v1/steering")).json()["workers"]
        busy = {name: metric(server, f"vllm:num_requests_{name}") for name in ("running", "waiting")}
    if any(busy.values()):
        soak.wrong.append(f"requests are left in the engine: {busy}")
    if server.process.poll() is not None:
        soak.wrong.append("the server has ended by itself")
    largest = check(soak, reference, directions)
    current = {name: bodies[name, soak.puts[name][-1][2]] for name in NAMES}
    left = server.kill()
    server = Server(arguments.model, folder, arguments.clients, arguments.eager)
    try:
        for name, content in current.items():
            again = httpx.get(f"{server.url}/v1/steering/directions/{name}", timeout=60)
            if again.content != content:
                soak.wrong.append(f"after kill -9 the direction {name} is another")
    finally:
        server.process.terminate()
        server.process.wait(60)
    return {
        "model": arguments.model,
        "clients": arguments.clients,
        "seconds": round(seconds, 1),
        "counts": dict(soak.counts),
        "answers_checked": len(soak.answers),
        "largest_difference": largest,
        "workers": workers,
        "server_mib": memory,
        "processes_left_after_kill": left,
        "wrong": soak.wrong[:50],
        "wrong_in_all": len(soak.wrong),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--eager", action="store_true", help="let the server run without compiling")
    parser.add_argument("--quick", action="store_true", help="4 clients for 15 seconds, eager; writes nothing")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.clients, arguments.seconds, arguments.eager = 4, 15.0, True
    with tempfile.TemporaryDirectory() as folder:
        result = asyncio.run(run(arguments, Path(folder)))
    table = Table("what", "figure", title=f"{result['clients']} clients, {result['seconds']:.0f} seconds")
    for kind, count in result["counts"].items():
        table.add_row(kind, str(count))
    for key in ("answers_checked", "largest_difference", "processes_left_after_kill", "wrong_in_all"):
        table.add_row(key.replace("_", " "), f"{result[key]:.3g}")
    table.add_row("MiB that the server held, over time", " ".join(map(str, result["server_mib"])))
    Console().print(table)
    for line in result["wrong"]:
        print(line)
    if not arguments.quick:
        write_json(RESULTS, result)
    sys.exit(bool(result["wrong_in_all"]))


if __name__ == "__main__":
    main()
