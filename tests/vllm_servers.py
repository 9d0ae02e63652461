"""Servers for tests: real processes with the bundled model, and what a client asks of them."""

import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import steerable as st

httpx = pytest.importorskip("httpx")

OPTIONS = (
    "--enforce-eager --dtype float32 --max-model-len 512 --max-num-seqs 8 --gpu-memory-utilization 0.1 --api-key secret"
)
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "WARNING"}


def direction():
    v = torch.randn(192, generator=torch.Generator().manual_seed(0))
    return st.Direction({st.Site("resid_post", 3): v / v.norm() * 6}, behaviour="happy", model_id="pocket")


@contextmanager
def served(folder, *options):
    """The process of a server and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("steerable")), "serve", "pocket", "--port", str(port)]
    command += [
        "--directions",
        str(folder / "directions"),
        "--preset",
        "merry=0.5 happy@generated",
        "--",
        *OPTIONS.split(),
        *options,
    ]
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(command, env=os.environ | ENVIRONMENT, stdout=log, stderr=log)
    try:
        for _ in range(600):
            try:
                httpx.get(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except httpx.HTTPError:
                assert server.poll() is None, (folder / "log").read_text()[-4000:]
                time.sleep(1)
        yield server, f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(60)


@contextmanager
def connected(url):
    with httpx.Client(base_url=url, headers={"Authorization": "Bearer secret"}, timeout=300) as client:
        assert client.put("/v1/steering/directions/happy", content=direction().to_bytes()).status_code in (200, 201)
        yield client


def scores(client, model="pocket", steering=None, **more):
    body = {"model": model, "prompt": [5, 6, 7, 8], "max_tokens": 4, "temperature": 0, "logprobs": 0, **more}
    if steering is not None:
        body["vllm_xargs"] = {"steering": steering}
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["logprobs"]["token_logprobs"]


def metrics_of(client):
    return dict(line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if line[0] != "#")
