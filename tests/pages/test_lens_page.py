"""The page and the section of a lens document that is written here by hand."""

import copy
import json
from html.parser import HTMLParser

import pytest
from labels import check_labels

from steerable.pages.lens_page import page, section

TOP = [[" wait", 0.9], ["<b>&", 0.5], ["\n", 0.4]]


def group(norm, auc):
    cell = {"score": "cosine", "norm": norm, "group": "doubt", "mean": 1.25, "auc": auc, "top": 0.06, "bottom": 0.0}
    return cell | {"z": 2.5, "beyond": True}


def vector(layer, relative=0.5):
    said = [{"score": s, "norm": n, "top": TOP, "bottom": TOP[::-1]} for s in ("cosine", "dot") for n in (False, True)]
    name = f"resid_post.{layer}"
    about = {"name": name, "site": name, "layer": layer, "row": None, "norm": 2.0, "relative_norm": relative}
    return about | {"tokens": said, "groups": [group(False, 0.875), group(True, 0.75)]}


DOCUMENT = {
    "file": "runs/rl/bias.safetensors",
    "model": "pocket",
    "direction": {"model_id": "pocket", "behaviour": "<i>doubt</i>", "method": "rl", "strength": 1.0},
    "width": 192,
    "vocabulary": 1328,
    "k": 3,
    "vectors": [vector(0), vector(1)],
    "skipped": ["mlp_act.0"],
    "groups": {"doubt": {"tokens": 10, "share": 0.01, "examples": [" wait", " but"]}},
    "random": {
        "vectors": 200,
        "seed": 0,
        "groups": [{"score": "cosine", "norm": n, "group": "doubt", "auc": [0.125, 0.8]} for n in (False, True)],
    },
    "beyond_random": {"cells": 4, "outside": 3},
    "cosines": {"labels": ["resid_post.0", "resid_post.1"], "matrix": [[1.0, -0.25], [-0.25, 1.0]], "random": 0.14},
    "singular_values": [2.5, 0.5],
    "stable_rank": 1.04,
    "random_stable_rank": [1.7, 1.98],
    "persistence": None,
}
FOLLOWED = {
    "chains": "chains.jsonl",
    "sources": [0, 1],
    "diff_diff": [[1.0, 0.62], [None, 1.0]],
    "diff_vector": [[1.0, None], [None, 1.0]],
    "relative": [[0.3, 0.2], [None, 0.31]],
    "random": {
        "diff_diff": [[1.0, 0.93], [None, 1.0]],
        "diff_vector": [[0.02, None], [None, 0.01]],
        "relative": [[0.3, 0.21], [None, 0.31]],
    },
    "tokens": 1789,
    "texts": 12,
    "cut": 0,
    "strength": 1.0,
    "where": "all",
}


class _Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.seen, self.sources = [], [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.sources += [v for k, v in attributes if k in ("src", "href") and not v.startswith("data:")]
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        pass


@pytest.mark.parametrize("followed", [None, FOLLOWED])
def test_the_page_is_whole_and_loads_nothing(followed):
    document = DOCUMENT | {"persistence": followed}
    made = page(document)
    found = _Tags()
    found.feed(made)
    assert not found.open and found.sources == [] and "script" not in found.seen and "@import" not in made
    assert "&lt;b&gt;&amp;" in made and "<b>&" not in made and "<i>doubt" not in made and "↵" in made
    part = section(document, "vectors-lens")
    assert part.startswith('<section id="vectors-lens">') and part in made.replace('id="lens"', 'id="vectors-lens"')
    assert page(document) == made
    assert page(json.loads(json.dumps(document))) == made  # what the file says is all that is needed


def test_what_the_section_says():
    made = section(DOCUMENT | {"persistence": FOLLOWED})
    for said in (
        "2 vectors, stable rank 1.04; random vectors of these norms have 1.70 to 1.98.",
        "Cosine with the rows of the unembedding, without the final norm",
        "Dot product, with the final norm",
        "␣wait",
        "Not in the residual stream, so not read: mlp_act.0",
        "10 tokens: ␣wait, ␣but",
        "0.875, 2.5 random deviations",
        "3 of 4 values lie beyond",
        "−0.25",
        "How long the shift persists",
        "of 12 texts",
        "0.62",
        "0.93",
    ):
        assert said in made, said
    assert made.index("without the final norm") < made.index("with the final norm")
    assert "How long" not in section(DOCUMENT)


def test_many_layers_and_one(tmp_path):
    many = copy.deepcopy(DOCUMENT) | {"vectors": [vector(i, None) for i in range(40)]}
    many["cosines"] = {"labels": [], "matrix": [[0.5] * 40 for _ in range(40)], "random": 0.1}
    made = page(many)
    assert "dense-heat" in made and "As a share of the mean activation norm" not in made
    one = DOCUMENT | {"vectors": [vector(3)], "singular_values": [2.0], "stable_rank": 1.0}
    one["cosines"] = {"labels": [], "matrix": [[1.0]], "random": 0.1}
    assert "One vector." in page(one) and "Singular values" not in page(one)


@pytest.mark.parametrize("layers", [2, 130])
def test_labels_stay_in_their_panels(layers):
    document = copy.deepcopy(DOCUMENT) | {"vectors": [vector(layer) for layer in range(layers)]}
    names = [one["name"] for one in document["vectors"]]
    document["cosines"] = {"labels": names, "matrix": [[0.5] * layers] * layers, "random": 0.14}
    check_labels(str(section(document)))
