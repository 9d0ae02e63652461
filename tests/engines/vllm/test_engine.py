"""Steering inside stock vLLM, on the bundled model: equal to the other engine, request by request, in one batch."""

import os
from dataclasses import replace
from itertools import cycle
from types import SimpleNamespace

import pytest
import torch
from vllm_engines import ENVIRONMENT, PARITY

import steerable as st
from steerable.chains.generation import Job, generate_jobs
from steerable.engines.base import Continuation
from steerable.engines.sampling import Decoding
from steerable.engines.vllm.banks import KINDS
from steerable.engines.vllm.settings import Settings
from steerable.models.loading import Loaded
from steerable.steering.schedule import Uniform
from steerable.steering.think import render

vllm = pytest.importorskip("vllm", reason="vLLM is not installed: `make vllm` sets it up")
pytestmark = pytest.mark.slow

OPTIONS = {
    "dtype": "float32",
    "max_model_len": 512,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 64,  # prompts come in chunks, beside tokens of other requests
    "block_size": 32,  # so that prompts share blocks
    "gpu_memory_utilization": 0.1,
}
SETTINGS = Settings(maps=2, gates=2)


@pytest.fixture(scope="module")
def environment():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, os.environ.get(name, value))
        yield


ENGINES = []  # an engine that goes away takes the process groups of the others with it


@pytest.fixture(scope="module", params=["eager", "compiled"])
def engine(request, environment):
    from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT

    _ROPE_DICT.clear()  # else the compiled model takes the eager one's rotary kernel over, which rounds otherwise
    ENGINES.append(st.VllmEngine.start("pocket", SETTINGS, enforce_eager=request.param == "eager", **OPTIONS))
    return ENGINES[-1]


@pytest.fixture(scope="module")
def prompts(reference):
    questions = ("How many legs do 3 cats have?", "Solve for x: 2*x + 3 = 9", "State the sum of 3 + 4 - 2.")
    return [reference.tokenizer(render(reference.tokenizer, text))["input_ids"] for text in questions]


def directions():
    generator = torch.Generator().manual_seed(0)

    def of(rows, *layers):
        vectors = {st.Site("resid_post", i): torch.randn(*rows, 192, generator=generator) for i in layers}
        return st.Direction({site: v / v.norm() * 6 for site, v in vectors.items()})

    return [of((), 1, 3), of((), 0, 2, 4, 5), of((), 3), of((), 2, 3, 4)], of((2,), 1, 3)


def steerings():
    """Vectors, strengths, gates, maps, schedules and layers, and none."""
    shifts, plane = directions()
    strengths, chosen = cycle((0.8, -0.5, 1.0)), cycle(shifts)
    gates = ("all", "prompt", "generated", "thinking", "answer", "boundary", "last_prompt", "positions(2, 9)")
    gates = (*gates, "thinking & ~boundary", "tokens(40, 50, 60)")
    maps = (None, "ablate", "clip(-1, 1)", "affine(1.2, 0.5)")
    rows = [next(chosen).steering(next(strengths), where=gate, map=phi) for gate in gates for phi in maps]
    planes = ("rotate(40)", "rotate_to(100)", "clip(-2, 0.5)", "affine(0.9, 0.3, -1, 1)", "ablate")
    rows += [plane.steering(0.7, where="thinking", map=phi) for phi in planes]
    a, b, c, d = shifts
    when, probe, latched, thinking = (getattr(st.selectors, n) for n in ("when", "probe", "latched", "thinking"))
    gates = (
        when(a, ">", 0.0), ~when(a, ">=", 0.1) & thinking, when(a, "<", 0.0) | probe(a, ">", 0.6, 0.2),
        latched(when(a, ">", 0.0)), latched(when(a, "<", 0.0) & ~thinking),
        ~latched(probe(a, ">", 0.5)) & when(a, "<", 0.1),
    )  # fmt: skip
    rows += [one.steering(0.7, [3], where=gate, map=phi) for gate in gates for one, phi in ((c, None), (d, "ablate"))]
    rows += [b.steering(0.7, [2, 4, 5], where=gate) for gate in gates]  # which read layers 1 and 3
    rows.append(a.steering(0.7, where=gates[0], schedule="until(10)") + d.steering(0.5, where=when(d, "<", 0.0)))
    side = {site: plane_[0] for site, plane_ in plane.vectors.items()}
    rows.append(plane.steering(map="rotate_to(100)", where=when(side, ">", 0.0)))  # adaptive Angular Steering
    rows += [a.steering(0.5, where="thinking", schedule=s) for s in ("ramp(0, 1, 20)", "until(10)", "until(close)")]
    return [
        *rows,
        a.steering(0.5, where="thinking") + b.steering(-0.4, where="answer"),
        a.steering(0.5, where="generated") + c.steering(0.5, where="generated"),
        a.steering(0.5, rescale=True),
        a.steering(1.0, schedule="layers(1, 0.5, 0.2, 0.1)"),
        a.steering(0.5, map="ablate") + c.steering(0.5, where="thinking"),  # an addition behind a map
        b.steering(1.0, where="answer") + plane.steering(1.0, map="rotate(30)", rescale=True),
        *[()] * 6,
    ]


def generated(engine, prompts, steerings, tokens=48, **options):
    """Greedy texts, and vLLM's log-probability of each token as it was generated."""
    from vllm.inputs.engine import tokens_input

    params = [
        engine._params(s, temperature=0.0, max_tokens=tokens, logprobs=0, ignore_eos=True, **options) for s in steerings
    ]
    llm = engine.llm.llm_engine
    for number, (prompt, one) in enumerate(zip(cycle(prompts), params, strict=False)):
        llm.add_request(str(number), tokens_input(prompt), one)
    done = {}
    while llm.has_unfinished_requests():
        done |= {int(output.request_id): output for output in llm.step() if output.finished}
    texts = [done[n].outputs[0] for n in range(len(params))]
    scores = [[row[i].logprob for i, row in zip(o.token_ids, o.logprobs, strict=True)] for o in texts]
    return [list(o.token_ids) for o in texts], [torch.tensor(row) for row in scores], done


def differences(reference, prompts, steerings, ids, scores):
    sequences = [Continuation(p, i, s) for p, i, s in zip(cycle(prompts), ids, steerings, strict=False)]
    expected = reference.logprobs(sequences)
    return [float((a - b).abs().max()) for a, b in zip(scores, expected, strict=True)]


def test_steered_texts_have_the_log_probs_of_the_other_engine(engine, reference, prompts):
    steered = steerings()
    for _ in range(2):  # the second time with prompts in the prefix cache
        ids, scores, _ = generated(engine, prompts, steered)
        assert max(differences(reference, prompts, steered, ids, scores)) < PARITY
    plain = differences(reference, prompts, [()] * len(steered), ids, scores)
    assert sum(d > 0.01 for d in plain) > len(steered) // 2  # steering did something


def test_scored_texts_have_the_log_probs_of_the_other_engine(engine, reference, prompts):
    rows = steerings()
    texts = reference.generate([st.Request(p) for p in prompts], max_new_tokens=60)
    sequences = [
        Continuation(p, c.ids, s) for (p, c), s in zip(cycle(zip(prompts, texts, strict=True)), rows, strict=False)
    ]
    pairs = zip(engine.logprobs(sequences), reference.logprobs(sequences), strict=True)
    assert max(float((a - b).abs().max()) for a, b in pairs) < PARITY


def test_requests_draw_and_stop_as_in_the_other_engine(engine, reference, prompts):
    a, *_ = directions()[0]
    decodings = cycle((None, Decoding(), Decoding(0.7, top_p=0.9), Decoding(0.0)))
    rows = [(), a.steering(0.3, where="thinking"), a.steering(0.6, where="thinking", schedule="uniform")] * 4
    rows[2] = a.steering(0.6, where="thinking", schedule="uniform_cosine")
    requests = [
        st.Request(p, seed, s, next(decodings)) for seed, (p, s) in enumerate(zip(cycle(prompts), rows, strict=False))
    ]
    assert engine.generate(requests, max_new_tokens=40) == reference.generate(requests, max_new_tokens=40)


def test_a_request_by_name_draws_its_strength_from_its_seed(engine, prompts):
    from vllm import SamplingParams

    a, *_ = directions()[0]
    engine.update("walk", a)

    def scores(text, seed=None):
        params = SamplingParams(temperature=0.0, max_tokens=8, logprobs=0, seed=seed, extra_args={"steering": text})
        [output] = engine.llm.generate([{"prompt_token_ids": prompts[0]}], params, use_tqdm=False)
        return [row[i].logprob for i, row in zip(output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True)]

    drawn = scores("1.0 walk|uniform(0.2, 1)", seed=5)
    assert drawn == pytest.approx(scores(f"{Uniform(0.2, 1).drawn(5)!r} walk"), abs=PARITY)
    assert drawn != pytest.approx(scores("1.0 walk|uniform(0.2, 1)", seed=6), abs=1e-3)
    assert scores("1.0 walk|uniform(0.2, 1)") != pytest.approx(scores("1.0 walk|uniform(0.2, 1)"), abs=1e-3)


def test_chains_of_the_main_job_are_those_of_the_other_engine(engine, reference):
    loaded = Loaded(reference.model, reference.tokenizer)
    tasks = [{"id": str(n), "prompt": f"How many legs do {n} cats have?"} for n in range(2, 6)]
    jobs = [Job(tasks, (0, 1)), Job(tasks, steering=directions()[0][0].steering(0.3, where="thinking"))]
    chains = generate_jobs(loaded, jobs, max_new_tokens=40, engine=engine)
    assert chains == generate_jobs(loaded, jobs, max_new_tokens=40, workers=1)


def test_unsteered_requests_are_those_of_an_engine_without_steering(engine, environment, prompts):
    from vllm import LLM

    is_eager = engine.llm.llm_engine.vllm_config.model_config.enforce_eager
    if not is_eager:
        pytest.skip("one engine is compiled here, not two")
    path = engine.llm.llm_engine.vllm_config.model_config.model
    plain = st.VllmEngine(LLM(path, enforce_eager=True, **OPTIONS), "pocket")
    ENGINES.append(plain)
    rows = [(), directions()[0][0].steering(0.8, where="thinking"), ()] * 4
    ids, scores, _ = generated(engine, prompts, rows)
    other_ids, other_scores, _ = generated(plain, prompts, [()] * len(rows))
    pairs = [n for n, row in enumerate(rows) if row == ()]
    assert [ids[n] for n in pairs] == [other_ids[n] for n in pairs]
    assert all(torch.equal(scores[n], other_scores[n]) for n in pairs)
    with pytest.raises(st.UsageError, match="does not steer"):
        plain.generate([st.Request(prompts[0], steering=rows[1])])


def test_prefixes_are_shared_by_equal_steerings_alone(engine, prompts):
    a, *_ = directions()[0]
    long = [prompts[0] * 8]
    cached = []
    for steering in ((), a.steering(0.5), a.steering(0.5), a.steering(0.6), a.steering(0.5, where="prompt"), ()):
        _, _, done = generated(engine, long, [steering], tokens=4)
        cached.append(done[0].num_cached_tokens)
    assert cached[0] == cached[1] == cached[3] == cached[4] == 0
    assert cached[2] == cached[5] > 32


def test_a_name_means_what_it_was_last_given(engine, reference, prompts):
    """Between the steps of a training; the prompt lies in the prefix cache, as another direction left it."""
    a, b, *_ = directions()[0]
    cached, long, wide = [], [prompts[0] * 8], st.Direction({st.Site("resid_post", 3): torch.ones(5)})
    for direction in (a, b, b):
        engine.update("policy", direction)
        ids, scores, done = generated(engine, long, [()], tokens=4, extra={"steering": "0.45 policy@prompt"})
        assert max(differences(reference, long, [direction.steering(0.45, where="prompt")], ids, scores)) < PARITY
        cached.append(done[0].num_cached_tokens)
    assert cached[0] == cached[1] == 0 < cached[2]
    engine.update("drawn", replace(a, schedule=Uniform(0.5, 1.0)))
    for name, direction, message in (("a b", a, "cannot name"), ("x", wide, "width 5")):
        with pytest.raises(st.UsageError, match=message):
            engine.update(name, direction)


@pytest.mark.parametrize(
    "steering, message",
    [
        ("0.5 happy", "no folder of directions"),
        ('[{"vectors": {"9": [1.0]}}]', "layers 0 to 5"),
        ('[{"vectors": {"2": [1.0, 2.0]}}]', "width 2, but the model's width there is 192"),
        ('{"vectors": {"2": [1.0]}, "strenght": 1}', "unknown key 'strenght'"),
        ('{"vectors": {"2": [', "no sound JSON"),
        (12, "holds interventions"),
    ],
)
def test_what_cannot_be_done_is_refused_before_the_engine(engine, steering, message):
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match=message):
        engine.llm.generate(
            [{"prompt_token_ids": [5, 6]}], SamplingParams(extra_args={"steering": steering}), use_tqdm=False
        )
    with pytest.raises(st.UsageError, match="max_new_tokens"):
        engine.generate([st.Request([5])], max_new_tokens=0)
    assert not engine.llm.llm_engine.has_unfinished_requests()


def test_activations_are_those_of_the_commit_that_is_served(monkeypatch):
    seen = {}
    monkeypatch.setattr("steerable.engines.vllm.engine.load", lambda name, **options: seen.update(options) or (0, 0))
    monkeypatch.setattr("steerable.engines.vllm.engine.capture_texts", lambda *args: None)
    served = SimpleNamespace(revision="abc", trust_remote_code=True)
    config = SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=SimpleNamespace(model_config=served)))
    st.VllmEngine(config, "owner/model").capture(["2"])
    assert seen == vars(served)


def test_a_model_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("VLLM_LOGGING_STREAM", raising=False)
    with pytest.raises(st.SteerableError, match="vLLM does not start with nobody/nothing"):
        st.VllmEngine.start("nobody/nothing")
    assert vllm.envs.VLLM_LOGGING_STREAM == "ext://sys.stderr"  # the standard output is for results


def test_maps_that_were_not_prepared_are_refused(engine, prompts):
    shifts, plane = directions()
    swap = st.Direction({st.Site("resid_post", 3): torch.ones(192)}).steering(map="swap([1.0])")
    wide = st.Direction({st.Site("resid_post", 3): torch.eye(192)[:3]}).steering(map="ablate")
    three = sum((shifts[0].steering(map="ablate") for _ in range(3)), plane.steering(0.0))
    for steering, message in ((swap, "swap takes"), (wide, '"rank": 3'), (three, '"maps": 3')):
        with pytest.raises(st.UsageError, match=message):
            engine.generate([st.Request(prompts[0], steering=steering)])


def test_more_steerings_than_a_step_has_requests(engine, reference, prompts):
    """Slots are used again and again; each text is that of its own steering."""
    generator = torch.Generator().manual_seed(1)
    rows = [
        st.Direction({st.Site("resid_post", 2): torch.randn(192, generator=generator)}).steering(0.4)
        for _ in range(5 * OPTIONS["max_num_seqs"])
    ]
    ids, scores, _ = generated(engine, prompts, rows, tokens=4)
    assert max(differences(reference, prompts, rows, ids, scores)) < PARITY


@pytest.mark.parametrize("broken", ["no bank", "stale bank", "no gates"])
def test_steering_that_does_nothing_is_noticed(engine, broken):
    """A trap: one layer is missed, or reads a bank that nobody fills, as a graph from a stale cache would, or asks no
    condition."""
    from steerable.engines.vllm.bite import check_bite

    worker = engine.llm.llm_engine.model_executor.driver_worker.worker
    if not engine.llm.llm_engine.vllm_config.model_config.enforce_eager:
        pytest.skip("a compiled graph cannot be broken by what is not traced any more")
    layer = worker.model_runner.get_model().model.layers[2]
    steered, bank = type(layer), layer.steering
    check_bite(worker.model_runner, worker.steering)
    try:
        if broken == "no bank":
            layer.__class__ = steered.__mro__[1]
        elif broken == "stale bank":
            layer.steering = type(bank)(SETTINGS, dict.fromkeys(KINDS, 2), 192, worker.steering.tokens)
        else:
            bank._answer = lambda h, n: torch.zeros(n, dtype=torch.int64)
        with pytest.raises(st.SteerableError, match="does nothing at layers 2 of"):
            check_bite(worker.model_runner, worker.steering)
    finally:
        layer.__class__, layer.steering = steered, bank
        vars(bank).pop("_answer", None)
