"""`steerable serve` as a client sees it: a real process, the bundled model."""

import asyncio
import json
from types import SimpleNamespace

import pytest
import torch
from vllm_servers import connected, direction, metrics_of, scores, served

import steerable as st
from steerable.jobs import serving

pytest.importorskip("vllm", reason="vLLM is not installed: `make vllm` sets it up")
httpx = pytest.importorskip("httpx")
pytestmark = pytest.mark.slow


def test_options_of_vllm_stand_beside_those_of_steering(monkeypatch, tmp_path):
    from vllm.entrypoints.cli.serve import ServeSubcommand

    from steerable.jobs.serving import serve

    def start(args):
        assert args.additional_config["x"] == 1 and args.max_model_len == 9
        assert (
            args.additional_config["steering"] | {"lanes": 3, "bank": "bfloat16"} == args.additional_config["steering"]
        )
        raise errors.pop()

    for name in ("VLLM_PLUGINS", "STEERABLE_PRESETS", "VLLM_USE_RUST_FRONTEND"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(ServeSubcommand, "cmd", start)
    more = '{"steering": {"bank": "bfloat16"}, "x": 1}'
    errors = [ValueError("it is too long"), OSError(98, "address in use")]
    for message in ("address in use", "it is too long"):
        with pytest.raises(st.SteerableError, match=f"vLLM does not serve: .*{message}"):
            serve("pocket", ["--max-model-len", "9", "--additional-config", more], directions=tmp_path, lanes=3)
    with pytest.raises(st.UsageError, match="gRPC has no field for a steering"):
        serve("pocket", ["--grpc"], directions=tmp_path)
    for wrong in ('{"steering": 5}', "[1]"):
        with pytest.raises(st.UsageError, match="expected a JSON object, with one in it as 'steering'"):
            serve("pocket", ["--additional-config", wrong], directions=tmp_path)


def test_plugins_are_those_that_vllm_would_load_by_itself(monkeypatch):
    """Those with routes are loaded only where somebody names them."""
    points = {
        "vllm.general_plugins": ["steerable", "one"],
        "vllm.stat_logger_plugins": ["figures"],
        "vllm.endpoint_plugins": ["routes"],
    }
    monkeypatch.setattr(serving, "entry_points", lambda group: [SimpleNamespace(name=n) for n in points.get(group, ())])
    assert serving._allowed(None) == ["steerable", "one", "figures"]
    assert serving._allowed("routes,one") == ["routes", "one", "steerable"]


def test_engines_that_were_started_without_steering_are_not_served():
    """As `vllm serve --headless` on another machine."""
    from steerable.serve.endpoint import Endpoint

    async def ask(*call):
        raise RuntimeError("Method 'steering_status' is not implemented.")

    config = SimpleNamespace(additional_config={"steering": {}})
    client = SimpleNamespace(vllm_config=config, engine_core=SimpleNamespace(call_utility_all_async=ask))
    with pytest.raises(st.UsageError, match="an engine of this server does not steer"):
        asyncio.run(Endpoint().init_state(client, None, None))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def directions(folder):
    return folder / "directions"


@pytest.fixture(scope="module")
def server(folder):
    with served(folder) as server:
        yield server


@pytest.fixture(scope="module")
def url(server):
    return server[1]


@pytest.fixture
def client(url):
    with connected(url) as client:
        yield client


def test_a_request_is_steered_by_its_model_or_its_field(client):
    plain = scores(client)
    happy = scores(client, "pocket:happy")
    assert happy != plain
    assert happy == scores(client, steering="1.0 happy") == scores(client, steering='{"direction": "happy"}')
    vectors = json.dumps({"vectors": {"3": direction().at(3).tolist()}})
    assert happy == pytest.approx(scores(client, steering=vectors), abs=1e-5)
    assert scores(client, "pocket:merry") == scores(client, steering="0.5 happy@generated")
    assert scores(client, steering="0 happy") == plain == scores(client)
    names = [model["id"] for model in client.get("/v1/models").json()["data"]]
    assert names == ["pocket", "pocket:happy", "pocket:merry"]
    [worker] = client.get("/v1/steering").json()["workers"]
    assert worker["layers"] == [0, 1, 2, 3, 4, 5] and worker["tokens"] > 0
    metrics = metrics_of(client)
    assert float(metrics["steerable_requests_total"]) > 0
    assert float(metrics["steerable_tokens_total"]) == worker["tokens"]
    for kind in ("vectors", "maps", "gates"):
        assert [float(metrics[f'steerable_{name}{{kind="{kind}"}}']) for name in ("slots_used", "slots")] == worker[
            kind
        ]


@pytest.mark.parametrize(
    "body, status, message",
    [
        ({"vllm_xargs": {"steering": "0.5 sad"}}, 400, "no direction is known as 'sad'"),
        ({"vllm_xargs": {"steering": "0.5 sad"}, "stream": True}, 400, "no direction is known as 'sad'"),
        ({"vllm_xargs": {"steering": '{"vectors": {"3": [1, 2]}}'}}, 400, "width 2"),
        ({"vllm_xargs": {"steering": "1 happy"}, "model": "pocket:happy"}, 400, "has another: give one"),
        ({"model": "pocket:happy", "use_beam_search": True, "n": 2}, 400, "beam search drops the steering"),
        ({"model": "pocket:sad"}, 404, "does not exist"),
        ({"model": "pocket", "use_beam_search": True, "vllm_xargs": {"steering": "1 happy"}}, 400, "beam search drops"),
        ({"steering": "1 happy"}, 400, "would be passed over here"),
        ({"extra_args": 5, "steering": "1 happy"}, 400, "'steering' would be passed over here"),
        ({"extra_args": {"steering": "1 happy"}}, 400, "would be passed over here"),
        ({"vllm_xargs": {"steer": "1 happy"}}, 400, "would be passed over here"),
        ({"vllm_xargs": {"Steering": "1 happy"}}, 400, "would be passed over here"),
        ({"vllm_xargs": {"hotwire": '{"id": "happy", "layer": 3}'}}, 400, "'hotwire' would be passed over here"),
        ({"vllm_xargs": {"steering": "1e39 happy"}}, 400, "smaller strength"),
        ({"vllm_xargs": {"steering": ""}}, 400, "expected the name of a direction"),
    ],
)
def test_what_cannot_be_steered_is_never_answered(client, body, status, message):
    answer = client.post("/v1/completions", json={"model": "pocket", "prompt": [5, 6], "max_tokens": 4} | body)
    assert answer.status_code == status and message in answer.json()["error"]["message"]


def test_routes_that_do_not_steer_refuse_a_steering(client):
    body = {"query": "1 + 1", "items": ["2"], "label_token_ids": [5, 6]}
    answer = client.post("/generative_scoring", json={"model": "pocket:happy"} | body)
    assert answer.status_code == 400 and "this route does not steer" in answer.json()["error"]["message"]
    assert client.post("/generative_scoring", json={"model": "pocket"} | body).status_code == 200
    for field in ({"steering": "1 happy"}, {"vllm_xargs": {"steering": "1 happy"}}):
        answer = client.post("/generative_scoring", json={"model": "pocket"} | body | field)
        assert answer.status_code == 400 and "passed over here: this route does not steer" in answer.text
    body = {"model": "pocket", "messages": [{"role": "user", "content": "1 + 1"}], "max_tokens": 2}
    assert client.post("/v1/messages", json=body).status_code == 200
    answer = client.post("/v1/messages", json=body | {"steering": "1 happy"})
    assert answer.status_code == 400 and "'steering' would be passed over here" in answer.text
    assert client.post("/tokenize", json={"model": "pocket:happy", "prompt": "2"}).status_code == 200


def test_strengths_are_drawn(client):
    seeds = [scores(client, steering="1 happy|uniform(0.5, 1)", seed=seed) for seed in (1, 2, 1)]
    assert seeds[0] == seeds[2] != seeds[1]


def test_a_file_that_is_no_direction(client, server, directions):
    (directions / "broken.safetensors").write_bytes(b"xx")
    rows = {row["id"]: row for row in client.get("/v1/steering/directions").json()["data"]}
    assert "not a sound" in rows["broken"]["error"] and str(directions) not in rows["broken"]["error"]
    assert "error" not in rows["happy"]
    assert client.delete("/v1/steering/directions/broken").status_code == 204


def test_a_preset_keeps_its_meaning(client):
    assert client.put("/v1/steering/directions/merry", content=direction().to_bytes()).status_code == 409


def test_directions_come_and_go(client, url):
    assert httpx.get(f"{url}/v1/steering/directions").status_code == 401
    assert httpx.put(f"{url}/v1/steering/directions/x", content=direction().to_bytes()).status_code == 401
    wide = st.Direction({st.Site("resid_post", 3): torch.ones(5)})
    for name, content, status in (
        (".hidden", direction().to_bytes(), 400),
        ("..%2fout", direction().to_bytes(), 404),
        ("pickled", b"\x80\x04", 400),
        ("wide", wide.to_bytes(), 400),
        ("big", b"x" * ((64 << 20) + 1), 413),
        ("calm", direction().to_bytes(), 201),
        ("calm", direction().to_bytes(), 200),
    ):
        assert client.put(f"/v1/steering/directions/{name}", content=content).status_code == status, name
    assert [d["id"] for d in client.get("/v1/steering/directions").json()["data"]] == ["calm", "happy"]
    assert client.get("/v1/steering/directions/calm").content == direction().to_bytes()
    assert client.delete("/v1/steering/directions/calm").status_code == 204
    assert client.delete("/v1/steering/directions/calm").status_code == 404


def test_its_processes_end_with_it(server):
    """The last test: `kill -9` of the server leaves none of them in the device's memory."""
    psutil = pytest.importorskip("psutil")
    children = psutil.Process(server[0].pid).children(recursive=True)
    assert children
    server[0].kill()
    assert psutil.wait_procs(children, timeout=60)[1] == []
