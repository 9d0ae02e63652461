"""`steerable serve` with vLLM's data parallelism."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
from vllm_servers import connected, metrics_of, scores, served

pytest.importorskip("vllm", reason="vLLM is not installed: `make vllm` sets it up")
pytestmark = pytest.mark.slow


@pytest.mark.skipif("STEERABLE_ALL" not in os.environ, reason="a minute; set STEERABLE_ALL=1 to run it")
def test_several_engines_behind_several_api_servers(tmp_path):
    """vLLM's data parallelism: each engine steers the requests that come to it, a direction that one API server takes
    in is there in the other, and the figures are those of all engines together."""
    with served(tmp_path, "--data-parallel-size", "2") as (process, url), connected(url) as client:
        with ThreadPoolExecutor(8) as pool:
            happy = list(pool.map(lambda _: scores(client, "pocket:happy", max_tokens=16), range(16)))
        plain = scores(client, max_tokens=16)
        assert all(one == pytest.approx(happy[0], abs=1e-4) for one in happy)
        assert happy[0] != pytest.approx(plain, abs=1e-2)
        workers = client.get("/v1/steering").json()["workers"]
        assert [worker["engine"] for worker in workers] == [0, 1]
        assert all(worker["tokens"] > 0 for worker in workers)
        metrics = metrics_of(client)
        assert float(metrics["steerable_requests_total"]) == 16
        assert float(metrics["steerable_tokens_total"]) == sum(worker["tokens"] for worker in workers)
        slots = [sum(worker["vectors"][n] for worker in workers) for n in range(2)]
        assert [float(metrics[f'steerable_{name}{{kind="vectors"}}']) for name in ("slots_used", "slots")] == slots
