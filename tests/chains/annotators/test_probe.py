"""The probe on the bundled model, whose exact annotator is the truth, and its file."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, cohen_kappa_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline

from steerable.chains.annotators.fitting import cross_validate
from steerable.chains.annotators.probe import Probe, labels_of, soft_fractions, train_probe
from steerable.chains.annotators.sentence_states import sentence_means
from steerable.chains.records import LABELS
from steerable.chains.segments import Segment, sentences
from steerable.models import loading as models
from steerable.models.grammar import shape
from steerable.store.errors import SteerableError, UsageError


@pytest.fixture(scope="module")
def probe(pocket):
    return train_probe(pocket.loaded, pocket.tasks, pocket.chains[:25], pocket.spans, layer=4)


def by_tfidf(texts, y, groups):
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(C=100, max_iter=500))
    return cross_val_predict(model, texts, y, groups=groups, cv=GroupKFold(5, shuffle=True, random_state=0))


def test_the_library_cuts_chains_as_the_exact_annotator_does(pocket):
    cut = {(c["task_id"], s.start, s.end) for c in pocket.chains for s in sentences(c["thinking"])}
    exact = {(s["task_id"], s["start"], s["end"]) for s in pocket.spans}
    assert len(exact - cut) < 0.01 * len(exact)


def test_held_out_tasks(pocket, probe):
    scores, chains = probe.scores, pocket.chains[:25]
    assert scores["tasks"] == scores["chains"] == 25 and probe.layers == (4,)
    text = {(c["task_id"], c["sample"]): c["thinking"] for c in chains}
    spans = [s for s in pocket.spans if (s["task_id"], s["sample"]) in text]
    assert scores["sentences"] == pytest.approx(len(spans), rel=0.02)
    words = [text[s["task_id"], s["sample"]][s["start"] : s["end"]] for s in spans]
    said = by_tfidf(words, y := [s["label"] for s in spans], [s["task_id"] for s in spans])
    assert scores["accuracy"] > max(0.95, accuracy_score(y, said), scores["majority"] + 0.3)
    assert scores["kappa"] > max(0.95, cohen_kappa_score(y, said))
    assert scores["macro_f1"] > 0.9 and scores["ece"] < 0.05
    assert set(scores["by_label"]) == set(probe.labels) == set(LABELS)


def test_wordings_that_it_never_saw(pocket):
    """Grouped by the opening words: what the words say is of no use then, what the model makes of them is."""
    gold = {(s["task_id"], s["start"], s["end"]): s["label"] for s in pocket.spans}

    def key(number, segment):
        return pocket.chains[number]["task_id"], segment.start, segment.end

    found, means = sentence_means(
        pocket.loaded, pocket.tasks, pocket.chains, [3], keep=lambda number, segment: key(number, segment) in gold
    )
    y = np.array([LABELS.index(gold[key(s.chain, s)]) for s in found])
    words = [pocket.chains[s.chain]["thinking"][s.start : s.end] for s in found]
    openings = np.array([" ".join(shape(text).split()[:2]) for text in words])
    scores = cross_validate({(3,): means[0].numpy()}, y, openings, 6).scores
    assert scores["kappa"] > 0.9
    assert scores["kappa"] > cohen_kappa_score(y, by_tfidf(words, y, openings)) + 0.3


def test_annotation_of_other_chains(pocket, probe):
    chains = pocket.chains[25:]
    spans = probe.annotate(pocket.loaded, pocket.tasks, chains)
    exact = {(s["task_id"], s["start"], s["end"]): s["label"] for s in pocket.spans}
    known = [(s["label"], exact[k]) for s in spans if (k := (s["task_id"], s["start"], s["end"])) in exact]
    assert len(known) > 0.95 * len(spans) and np.mean([a == b for a, b in known]) > 0.97
    assert [(s["task_id"], s["start"], s["end"]) for s in spans] == [
        (c["task_id"], s.start, s.end) for c in chains for s in sentences(c["thinking"])
    ]
    for s in spans:
        assert s["label"] == max(s["probabilities"], key=s["probabilities"].get)
        assert sum(s["probabilities"].values()) == pytest.approx(1, abs=1e-12)
    # the prompts may be given as texts, and one chain alone has the same probabilities
    texts = {t["id"]: pocket.loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": t["prompt"]}], tokenize=False, add_generation_prompt=True
    ) for t in pocket.tasks}  # fmt: skip
    alone = probe.annotate(pocket.loaded, texts, chains[:1])
    for a, b in zip(alone, spans, strict=False):
        assert a["probabilities"] == pytest.approx(b["probabilities"], abs=1e-4)
    assert probe.annotate(pocket.loaded, pocket.tasks, []) == []


def test_soft_fractions(pocket, probe):
    spans = probe.annotate(pocket.loaded, pocket.tasks, pocket.chains[25:])
    fractions = soft_fractions(spans)
    hard = {}
    for s in spans:
        hard.setdefault((s["task_id"], s["sample"]), []).append(s)
    assert fractions.keys() == hard.keys()
    for key, own in hard.items():
        total = sum(s["tokens"] for s in own)
        for label in probe.labels:
            wanted = sum(s["probabilities"][label] * s["tokens"] for s in own) / total
            assert fractions[key][label] == pytest.approx(wanted)
        assert sum(fractions[key].values()) == pytest.approx(1, abs=1e-9)
    exact = {(s["task_id"], s["start"], s["end"]): s["label"] for s in pocket.spans}
    for label in probe.labels:  # and near the true shares of the tokens
        true = sum(s["tokens"] for s in spans if exact.get((s["task_id"], s["start"], s["end"])) == label)
        soft = sum(s["tokens"] * s["probabilities"][label] for s in spans)
        assert abs(true - soft) / sum(s["tokens"] for s in spans) < 0.03


def test_probabilities_are_the_formula(probe):
    features = torch.randn(1, 5, 192, generator=torch.Generator().manual_seed(0)) * 3
    logits = ((features[0] - probe.mean) / probe.scale) @ probe.weight.T + probe.bias
    wanted = (logits / probe.temperature).double().softmax(-1)
    np.testing.assert_allclose(probe.probabilities(features), wanted, atol=1e-4)


@pytest.mark.slow
def test_layer_by_cross_validation_and_several_layers(pocket):
    chains = pocket.chains[:15]
    chosen = train_probe(pocket.loaded, pocket.tasks, chains, pocket.spans, folds=3)
    tried = {tuple(c["layers"]): c["log_loss"] for c in chosen.scores["layers"] if c["penalty"] == 100}
    assert len(tried) > 3 and chosen.layers == min(tried, key=tried.get)
    both = train_probe(pocket.loaded, pocket.tasks, chains, pocket.spans, layer=[4, 2], folds=3)
    assert both.layers == (2, 4) and both.weight.shape == (6, 2 * 192)
    spans = both.annotate(pocket.loaded, pocket.tasks, chains)
    exact = {(s["task_id"], s["start"], s["end"]): s["label"] for s in pocket.spans}
    assert np.mean([s["label"] == exact.get((s["task_id"], s["start"], s["end"])) for s in spans]) > 0.97


def test_labels_of_sentences_by_other_borders():
    text = "One two. Three four.  Five."
    cut = [Segment(0, 8), Segment(9, 20), Segment(22, 27)]

    def labels(*spans):
        return labels_of(text, cut, [{"start": a, "end": b, "label": label} for a, b, label in spans])

    assert labels((0, 20, "x")) == ["x", "x", None]
    assert labels((0, 4, "x")) == [None, None, None]  # 3 of 7 visible characters
    assert labels((0, 5, "x"), (22, 27, "y")) == ["x", None, "y"]  # 4 of 7
    assert labels((0, 13, "x"), (13, 27, "y")) == ["x", "y", "y"]
    assert labels((0, 27, "x"), (9, 20, "z")) == ["x", "z", "x"]
    assert labels() == [None, None, None]


def test_the_file(probe, tmp_path, pocket):
    path = probe.save(tmp_path / "a.safetensors")
    again = Probe.load(path)
    assert path.read_bytes() == again.save(tmp_path / "b.safetensors").read_bytes()
    assert again.scores == json.loads(json.dumps(probe.scores)) and again.labels == probe.labels
    one, two = (p.annotate(pocket.loaded, pocket.tasks, pocket.chains[:2]) for p in (probe, again))
    assert one == two
    retrained = train_probe(pocket.loaded, pocket.tasks, pocket.chains[:25], pocket.spans, layer=4)
    assert retrained.save(tmp_path / "c.safetensors").read_bytes() == path.read_bytes()


def test_damaged_files_are_refused(probe, tmp_path):
    with pytest.raises(UsageError, match="no probe file"):
        Probe.load(tmp_path / "none")
    data = probe.save(tmp_path / "sound").read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / "damaged"
    for _ in range(150):
        broken = bytearray(data)
        for place in rng.integers(0, min(len(data), 3000), 3):
            broken[place] = rng.integers(0, 256)
        path.write_bytes(broken[: rng.integers(0, len(data))] if rng.random() < 0.3 else broken)
        try:
            Probe.load(path)
        except SteerableError as error:
            assert "sound probe file" in str(error)
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2, 3)}, path)
    with pytest.raises(SteerableError, match="not a sound probe file"):
        Probe.load(path)


def test_what_does_not_fit_is_refused(probe, pocket, tiny_llama, tokenizer):
    other = models.Loaded(tiny_llama, tokenizer)
    with pytest.raises(UsageError, match="6 layers of width 192, this one has 4 of width 32"):
        probe.annotate(other, {}, [])
    with pytest.raises(UsageError, match="reads 'else', the model is 'pocket'"):
        replace(probe, model_id="else").annotate(pocket.loaded, pocket.tasks, pocket.chains[:1])
    for change, message in (
        ({"weight": probe.weight[:, :5]}, "shape"),
        ({"bias": probe.bias * float("nan")}, "NaN"),
        ({"temperature": 0.0}, "positive"),
        ({"layers": (9,)}, "cannot read layers"),
        ({"labels": ("a",) * 6}, "different labels"),
    ):
        with pytest.raises(UsageError, match=message):
            replace(probe, **change)
    deductions = [s for s in pocket.spans if s["label"] == "deduction"]
    for options, message in (
        ({"layer": 6}, "layers from 0 to 5"),
        ({"layer": []}, "layers from 0 to 5"),
        ({"folds": 60}, "2 to 3 folds"),
        ({"folds": 1}, "2 to 3 folds"),
        ({"spans": deductions}, "two labels"),
        ({"spans": []}, "two labels"),
    ):
        options = {"layer": 1, "folds": 2, "spans": pocket.spans} | options
        with pytest.raises(UsageError, match=message):
            train_probe(pocket.loaded, pocket.tasks, pocket.chains[:3], **options)
