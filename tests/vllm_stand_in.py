"""A model of transformers behind the calls that TRL makes of vLLM, in this process or as a server.

It takes tensors by a checkpoint's names, drops biases that it has no place for without a word, answers from its prefix
cache until that is reset, and as a server rebuilds every linear map of which something arrives: all as vLLM does.
"""

import importlib.util
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM


class Engine:
    """As `vllm.LLM`: `Engine(model="folder", ...)`. `last` is the newest one."""

    last = None

    def __init__(self, model, **_):
        self.inner = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval().requires_grad_(False)
        self.sent, self.resets, self.cache = [], 0, {}
        runner = SimpleNamespace(model=self)
        self.llm_engine = SimpleNamespace(
            model_executor=SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
        )
        Engine.last = self

    def load_weights(self, weights):
        held = dict(self.inner.named_parameters())
        for name, x in weights:
            self.sent.append((name, tuple(x.shape), x.dtype))
            if name in held:
                held[name].copy_(x)
            elif not name.endswith(".bias"):
                raise ValueError(f"There is no module or parameter named {name!r}")

    def reset_prefix_cache(self):
        self.resets += 1
        self.cache.clear()

    def scores(self, ids):
        if tuple(ids) not in self.cache:
            self.cache[tuple(ids)] = self.inner(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        return self.cache[tuple(ids)]

    def complete(self, prompt, max_tokens, logprobs):
        """Token ids, and of each step the likeliest tokens' and the drawn one's log-probability."""
        ids, steps = list(prompt), []
        for _ in range(max_tokens):
            scores = self.scores(ids)
            drawn = int(torch.multinomial(scores.exp(), 1))
            steps.append({int(i): float(scores[i]) for i in [*scores.topk(logprobs).indices, drawn]})
            ids.append(drawn)
        return ids[len(prompt) :], steps

    def generate(self, prompts, sampling_params, use_tqdm):
        found = []
        for prompt in prompts:
            ids, steps = self.complete(prompt["prompt_token_ids"], sampling_params.max_tokens, sampling_params.logprobs)
            ranked = [
                {i: SimpleNamespace(logprob=x, rank=rank) for rank, (i, x) in enumerate(step.items(), 1)}
                for step in steps
            ]
            output = SimpleNamespace(token_ids=ids, logprobs=ranked)
            found.append(SimpleNamespace(prompt_token_ids=prompt["prompt_token_ids"], outputs=[output]))
        return found


class Server:
    """As `vllm serve`, on a free port: `url`, `engine`, `calls` (paths). It dies of the call number `lives`."""

    def __init__(self, model, lives=10**9, port=0):
        self.engine, self.calls, self.lives, self.arrived = Engine(model), [], lives, None
        served = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def answer(self):
                body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
                served.calls.append(self.path)
                if len(served.calls) >= served.lives:
                    threading.Thread(target=served.die).start()
                    self.close_connection = True
                    return self.connection.close()
                found = json.dumps(served.reply(self.path.partition("?")[0], body)).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(found)))
                self.end_headers()
                self.wfile.write(found)

            do_GET = do_POST = answer

        self.http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def die(self):
        self.http.shutdown()
        self.http.server_close()

    def reply(self, path, body):
        if path == "/v1/models":
            return {"data": [{"id": "tiny"}]}
        if path == "/server_info":
            logprobs = {"logprobs_mode": "processed_logprobs"}
            return {"vllm_config": {"weight_transfer_config": {"backend": "nccl"}, "model_config": logprobs}}
        if path == "/start_weight_update":
            self.arrived = set()
        if path == "/finish_weight_update":
            self.rebuild()
        if path == "/reset_prefix_cache":
            self.engine.reset_prefix_cache()
            return {"success": True}
        if path == "/v1/completions":
            found = [self.choice(p, body) for p in body["prompt"] for _ in range(body["n"])]
            return {"choices": found}
        return {}

    def choice(self, prompt, body):
        ids, steps = self.engine.complete(prompt, body["max_tokens"], body["logprobs"])
        named = [{f"token_id:{i}": x for i, x in step.items()} for step in steps]
        tokens = [f"token_id:{i}" for i in ids]
        given = [step[token] for step, token in zip(named, tokens, strict=True)]
        logprobs = {"tokens": tokens, "token_logprobs": given, "top_logprobs": named}
        return {"prompt_token_ids": prompt, "token_ids": ids, "logprobs": logprobs}

    def receive(self, iterator, **_):
        """In place of the broadcast between GPUs."""
        for name, x in iterator:
            self.engine.load_weights([(name, x)])
            self.arrived.add(name)

    def rebuild(self):
        for name, module in self.engine.inner.named_modules():
            own = {f"{name}.{leaf}": p for leaf, p in module.named_parameters(recurse=False)}
            if own.keys() & self.arrived:
                for missing in own.keys() - self.arrived:
                    own[missing].uniform_(-1, 1)  # whatever was in that memory


def instead_of_vllm(monkeypatch, server=None):
    """TRL's own code, with `Engine` in this process, or with a `Server` and no GPU between."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: name if name == "vllm" else found(name, *a))
    monkeypatch.setattr("trl.generation.vllm_generation.is_vllm_available", lambda *a: True)
    monkeypatch.setattr("trl.generation.vllm_client.is_vllm_available", lambda *a: True)
    monkeypatch.setattr("trl.generation.vllm_generation.LLM", Engine, raising=False)
    monkeypatch.setattr("trl.generation.vllm_generation.SamplingParams", SimpleNamespace, raising=False)
    monkeypatch.setattr("trl.generation.vllm_client.VLLMClient.init_communicator", lambda self, device: None)
    monkeypatch.setattr("trl.generation.vllm_client._HAS_STATEFUL_TRAINER_ENGINE", True)
    monkeypatch.setattr("trl.generation.vllm_client._HAS_RESET_PREFIX_CACHE_SUCCESS", True)
    if server is not None:
        take = lambda iterator, **_: server().receive(iterator)  # noqa: E731
        monkeypatch.setattr("trl.generation.vllm_client.packed_nccl_broadcast_producer", take, raising=False)
