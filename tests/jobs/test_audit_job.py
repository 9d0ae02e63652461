"""`steerable audit`: a planted direction is trusted, a random one is not; what cannot be checked is listed."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from killed import kill_once, lines
from planted_model import planted_model, texts
from tokenizers.processors import TemplateProcessing

from steerable.chains import generation
from steerable.chains.text_pairs import pairs_sha256, read_pairs
from steerable.evals.calibration import calibrate
from steerable.evals.passages import Passage, passage_means
from steerable.jobs import audit_checks
from steerable.jobs.audit_checks import LOOKALIKES, Checks, _separated
from steerable.jobs.audit_job import audit, judge
from steerable.jobs.settings import Config
from steerable.methods.text_pairs import contrast
from steerable.models.loading import Loaded, load
from steerable.steering.direction import Direction
from steerable.store.errors import SteerableError, UsageError

NAMES = [
    "halves",
    "separation",
    "lookalikes",
    "effect",
    "sign",
    "linearity",
    "side effects",
    "budget",
    "heads",
    "turns",
    "drift",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    """A model with a planted direction, the direction, a random one, and pairs, as files."""
    root = tmp_path_factory.mktemp("audit")
    model, direction = planted_model()
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    sides = {"pairs": texts(), "clean": (texts()[0], texts(kinds=[range(22, 30)] * 2)[0])}
    sides["confounded"] = texts()[0], texts()[0]  # what looks alike lies where the concept lies
    for name, some in sides.items():
        words = ([" ".join(tokenizer.convert_ids_to_tokens(ids)) for ids in side] for side in some)
        rows = (json.dumps({"positive": a, "negative": b}) + "\n" for a, b in zip(*words, strict=True))
        (root / f"{name}.jsonl").write_text("".join(rows))
    pairs = read_pairs(root / "pairs.jsonl")
    loaded = load(root / "model")
    made = calibrate(*loaded, direction, pairs[0][:8] + pairs[1][:8], budget=0.05)
    made.save(root / "planted.safetensors")
    made.random_like(3).save(root / "random.safetensors")
    return root


def audited(place, name, **more):
    options = {"model": str(place / "model"), "max_new_tokens": 12, "limit": 4, "samples": 1, "workers": 1}
    return audit(place / f"{name}.safetensors", out=place / name, **options | more)


@pytest.fixture(scope="module")
def trusted(place):
    return audited(place, "planted", pairs=place / "pairs.jsonl", lookalikes=place / "clean.jsonl")


def test_a_planted_direction_is_trusted(trusted, place):
    status = {check["name"]: check["status"] for check in trusted["checks"]}
    assert list(status) == NAMES
    assert trusted["verdict"] == "trusted", trusted
    assert {status[name] for name in NAMES[:6]} == {"pass"}
    assert json.loads((place / "planted/audit.json").read_text()) == trusted
    page = (place / "planted/audit.html").read_text()
    assert "Trusted." in page and page.count("<svg") >= 3
    assert {name for name in NAMES if status[name] == "not checked"} == {"drift"}  # its few answers stay as they were
    sign = next(check for check in trusted["checks"] if check["name"] == "sign")
    assert len(sign["values"]["paraphrases"]) == 9 and "looks like another changes it by" in sign["figure"]
    a, b = (sign["values"]["paraphrases"][before][0] for before in LOOKALIKES[0])
    assert sign["values"]["lookalikes"] >= abs(a - b) / ((a + b) / 2)


def test_a_random_direction_is_not(place):
    result = audited(place, "random", pairs=place / "pairs.jsonl")
    failed = {check["name"] for check in result["checks"] if check["status"] == "fail"}
    assert result["verdict"] == "not trusted" and "effect" in failed
    assert any("Effect beside controls" in reason for reason in result["reasons"])


def test_without_data_it_is_weak_and_says_what_was_not_checked(place):
    result = audited(place, "planted", annotator="keywords")
    status = {check["name"]: check["status"] for check in result["checks"]}
    assert result["verdict"] == "weak"
    assert {name for name in NAMES if status[name] == "not checked"} == set(NAMES) - {"side effects", "budget"}
    reasons = {check["figure"] for check in result["checks"] if check["status"] == "not checked"}
    assert {reason for reason in reasons if "--lookalikes" not in reason} == {
        "no --pairs, and --annotator keywords cannot judge it: the behaviour 'planted' is none of its labels"
    }


def test_a_gate_that_stays_shut_says_nothing_of_the_vector(place):
    gated = replace(Direction.load(place / "planted.safetensors"), gate="thinking & boundary")
    gated.save(place / "gated.safetensors")
    result = audited(place, "gated", pairs=place / "pairs.jsonl")
    checks = {check["name"]: check for check in result["checks"]}
    for name in ("effect", "sign", "linearity"):
        assert checks[name]["status"] == "not checked" and "opens at no token of these texts" in checks[name]["figure"]
    assert checks["drift"]["figure"] == "steering changes no token of these chains"
    assert result["verdict"] == "weak" and "without --pairs" in result["reasons"][0]


def test_a_plane_is_judged_by_the_checks_that_apply_to_it(place):
    """The plane of what the pairs differ in and of what they share, and a turn from this towards that."""
    planted, (model, _) = Direction.load(place / "planted.safetensors"), planted_model()
    passages = [Passage.whole(ids) for side in texts() for ids in side]
    shared = passage_means(model, passages, list(planted.vectors))
    rows = {site: torch.stack([v, shared[site].mean(0)]) for site, v in planted.vectors.items()}
    replace(planted, vectors=rows, map="rotate_to(0)", unit="raw").save(place / "plane.safetensors")
    more = {"pairs": place / "pairs.jsonl", "lookalikes": place / "clean.jsonl", "strength": 0.3}
    result = audited(place, "plane", **more)
    checks = {check["name"]: check for check in result["checks"]}
    missing = [name for name in NAMES if checks[name]["status"] == "not checked"]
    assert missing == ["halves", "separation", "lookalikes", "heads", "turns", "drift"], checks
    assert {checks[name]["figure"] for name in missing} == {
        "it steers in a subspace of 2 rows, which is no one vector to be compared or projected on: only effect, sign, "
        "linearity, side effects and displacement are checked"
    }
    assert checks["effect"]["status"] == checks["sign"]["status"] == "pass", checks
    assert checks["effect"]["figure"].endswith("no label-shuffled ones of a subspace")
    assert result["verdict"] == "weak" and "a subspace of 2 rows" in result["reasons"][0], result["reasons"]
    plan = audited(place, "plane", dry_run=True, **more)
    assert plan["done"] == ["audit"]


CHAINS = {"limit": 4, "samples": 2, "controls": 1, "max_new_tokens": 60, "workers": 1, "model": "pocket"}


@pytest.fixture(scope="module")
def judged(finished, tmp_path_factory):
    """The audit of a direction of the bundled model, and its folder."""
    root = tmp_path_factory.mktemp("judged")
    file = finished / "vectors/candidates/onset.pooled/initializing.safetensors"
    Direction.load(file).only([3]).save(root / "initializing.safetensors")
    return root, audit(root / "initializing.safetensors", out=root / "out", **CHAINS)


def test_a_behaviour_is_judged_in_chains(judged):
    """Every check has its data: the spans of chains, and the share of the behaviour in them."""
    checks = {check["name"]: check for check in judged[1]["checks"]}
    assert [name for name in NAMES if checks[name]["status"] == "not checked"] == ["lookalikes"]
    assert checks["separation"]["status"] == "pass" and len(checks["turns"]["values"]["margins"]) == 4
    effects = checks["linearity"]["values"]["effects"]
    assert checks["effect"]["status"] in ("warn", "fail") and "too few tasks" in checks["effect"]["figure"]
    assert effects["1"] == checks["effect"]["values"]["effect"] == checks["sign"]["values"]["paraphrases"]["{prompt}"]


def test_it_goes_on_where_it_was_stopped(judged, steerable, monkeypatch):
    """Checks that were done and chains that were written are not done again, and the result is the same; the plan
    counts these chains."""
    root, result = judged
    file, again = root / "initializing.safetensors", root / "again"

    def stopped(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checks, "linear", stopped)
        with pytest.raises(KeyboardInterrupt):
            audit(file, out=again, **CHAINS)
    blocks = again.glob(".partial/*/*steered/*.jsonl")
    written = sum(len(block.read_text().splitlines()) for block in blocks)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in CHAINS.items()]
    said = steerable("audit", file, *options, "--out", root / "plan", "--dry-run", "--json")
    assert said.code == 0 and not (root / "plan").exists(), said.err
    assert json.loads(said.out)["stages"][0]["chains"] == written == 8 * (1 + 2 + 2 + 4 + 8)
    with monkeypatch.context() as patch:
        for name in ("halves", "separation", "effect_check", "sign"):
            patch.setattr(Checks, name, stopped)
        patch.setattr(generation, "_answer", stopped)
        assert audit(file, out=again, **CHAINS) == result
        patch.setattr(Checks, "all", stopped)
        assert audit(file, out=again, **CHAINS) == result
    for name in ("audit.json", "audit.html"):
        assert (again / name).read_bytes() == (root / "out" / name).read_bytes()
    assert not (again / ".partial").exists()


@pytest.mark.slow
def test_it_goes_on_where_it_was_killed(judged):
    root, again = judged[0], judged[0] / "killed"
    options = [f"--{name.replace('_', '-')}={value}" for name, value in CHAINS.items()]
    for chains in (4, 100):
        kill_once(
            lambda n=chains: lines(again, "*steered*/*.jsonl") >= n,
            "audit",
            root / "initializing.safetensors",
            *options,
            "--out",
            again,
        )
        assert not (again / "audit.json").exists()
    audit(root / "initializing.safetensors", out=again, **CHAINS)
    for name in ("audit.json", "audit.html"):
        assert (again / name).read_bytes() == (root / "out" / name).read_bytes()
    assert not (again / ".partial").exists() and not list(again.rglob("*.tmp"))


def test_pairs_that_it_was_made_of_are_cut_in_halves(place):
    loaded, sides = load(place / "model"), read_pairs(place / "pairs.jsonl")
    made = contrast(*loaded, *sides, layers=2, budget=None)
    made.save(place / "made.safetensors")
    more = {"pairs": place / "pairs.jsonl", "lookalikes": place / "confounded.jsonl"}
    result = audited(place, "made", strength=0.1, **more)
    assert next(c["status"] for c in result["checks"] if c["name"] == "lookalikes") == "fail"
    plan = audited(place, "made", strength=0.1, dry_run=True, **more)
    assert plan["done"] == ["audit"] and [stage["stage"] for stage in plan["stages"]] == ["answers", "checks"]
    assert "the other half" in next(c["figure"] for c in result["checks"] if c["name"] == "separation")


@pytest.mark.parametrize(
    ("checks", "verdict"),
    [
        ({"effect": "pass", "halves": "pass", "separation": "pass", "sign": "pass"}, "trusted"),
        ({"effect": "pass", "sign": "pass", "halves": "not checked", "separation": "pass", "turns": "warn"}, "trusted"),
        ({"effect": "pass", "sign": "pass", "halves": "not checked", "separation": "not checked"}, "weak"),
        ({"effect": "pass", "sign": "warn"}, "weak"),
        ({"effect": "pass", "side effects": "fail"}, "weak"),
        ({"effect": "warn", "sign": "pass"}, "weak"),
        ({"effect": "not checked", "side effects": "pass"}, "weak"),
        ({"effect": "pass", "separation": "fail"}, "not trusted"),
        ({"effect": "fail"}, "not trusted"),
    ],
)
def test_verdicts(checks, verdict):
    rows = [{"name": n, "title": n, "status": s, "figure": "?"} for n, s in checks.items()]
    said, reasons = judge(rows)
    assert said == verdict and reasons


@pytest.mark.parametrize(
    ("auc", "status"),
    [([0.9, 0.6, 1.0], "pass"), ([0.9, 0.45, 1.0], "warn"), ([0.7, 0.6, 0.8], "warn"), ([0.5, 0.2, 0.8], "fail")],
)
def test_separation_that_may_be_chance_does_not_pass(auc, status):
    assert _separated(auc) == status


def test_a_negative_strength_asks_for_less(place):
    job = SimpleNamespace(loaded=load(place / "model"), config=Config(model=str(place / "model")))
    pairs = read_pairs(place / "pairs.jsonl")
    checks = Checks(job, Direction.load(place / "planted.safetensors"), -1.0, pairs, None, [], None, 4, 1, 2)
    status, _, values = checks.effect_check()
    assert status == checks.sign()[0] == "pass" and values["effect"][1] > 0
    assert checks.effect_of == "the preference for the negative text of a pair, in nats a token"


def test_a_file_that_does_not_hold_what_its_pairs_make(place):
    """It names these pairs as its data, and points the other way."""
    pairs = read_pairs(place / "pairs.jsonl")
    job = SimpleNamespace(loaded=load(place / "model"), config=Config(model=str(place / "model")))
    turned = replace(-1.0 * Direction.load(place / "planted.safetensors"), data_sha256=pairs_sha256(*pairs))
    status, figure, _ = Checks(job, turned, 1.0, pairs, None, [], None, 4, 1, 2).separation()
    assert status == "fail" and figure.endswith("by the file's vector")


def test_what_begins_a_text_does_not_stand_within_one(place, monkeypatch):
    """A tokenizer that puts a BOS in front: behind other words, a text has none."""
    model, tokenizer = load(place / "model")
    begin = [("<user>", tokenizer.convert_tokens_to_ids("<user>"))]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<user> $A", special_tokens=begin)
    rows = []

    def asked(model, tokenizer, positive, negative, prompts):
        rows.append([*prompts[0], *positive[0]])
        return lambda steering: {}

    monkeypatch.setattr(audit_checks, "pair_preferences", asked)
    monkeypatch.setattr(audit_checks, "_BEFORE", ("", "w1 w2 "))
    job = SimpleNamespace(loaded=Loaded(model, tokenizer), config=Config(model=str(place / "model")))
    checks = Checks(job, planted_model()[1], 1.0, (["w3 w4"], ["w5 w6"]), None, [], None, 4, 1, 2)
    checks.effect(), checks.effect(1)
    assert [tokenizer.convert_ids_to_tokens(row) for row in rows] == [
        ["<user>", "w3", "w4"],
        ["<user>", "w1", "w2", "w3", "w4"],
    ]


def test_an_annotator_that_fails_says_nothing_of_the_vector(judged, tmp_path, monkeypatch):
    """A server that is away is no verdict: the same call goes on when it is back."""

    def away(*_, **__):
        raise SteerableError("the server failed")

    monkeypatch.setattr(audit_checks, "annotate", away)
    with pytest.raises(SteerableError, match="the server failed"):
        audit(judged[0] / "initializing.safetensors", out=tmp_path / "out", **CHAINS | {"limit": 1, "samples": 1})
    assert not (tmp_path / "out/audit.json").exists()


def test_refusals(place, steerable):
    with pytest.raises(UsageError, match="must be 1 or more"):
        audited(place, "planted", controls=0)
    said = steerable("audit", place / "none.safetensors", "--out", place / "x")
    assert said.code == 2 and said.err.count("\n") == 1
    narrow = Direction.load(place / "planted.safetensors")
    narrow.save(place / "narrow.safetensors")
    said = steerable("audit", place / "narrow.safetensors", "--model", "pocket", "--out", place / "x")
    assert said.code == 2 and "width 32" in said.err and not (place / "x").exists()
