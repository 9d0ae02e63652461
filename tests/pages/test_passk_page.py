"""The page and tables of pass@k say what passk.json says."""

import re
from html.parser import HTMLParser

import pytest
from labels import check_labels

from steerable.jobs.elicitation import against, summary
from steerable.pages import words
from steerable.pages.passk_page import findings, render, tables

KS = [1, 2, 4, 8]


def chains(right):
    """Eight judged chains a task; `right` of them."""
    return [
        {"task_id": f"t{task}", "correct": sample < c, "tokens": 10 + sample, "loops": 0.25, "closed": sample != 7}
        | {"nats": 2.0 * (task + 1)}
        for task, c in enumerate(right)
        for sample in range(8)
    ]


@pytest.fixture(scope="module")
def result():
    found = {"base": chains([2] * 20), "bias<b>": chains([8] * 12 + [0] * 8), "full": chains([0] * 20)}
    as_text = lambda curve: {str(k): v for k, v in curve.items()}  # noqa: E731
    arms = {}
    for name, rows in found.items():
        arms[name] = {"kind": "base", "source": "x"} | summary(rows, KS)
        arms[name]["passk"] = as_text(arms[name]["passk"])
        if name != "base":
            beside = against(name, rows, found["base"], KS)
            arms[name]["against_base"] = beside | {"difference": as_text(beside["difference"])}
    decoding = {"temperature": 0.6, "top_k": 0, "top_p": 0.95}
    settings = {"tasks": "gsm8k", "samples": 8, "ks": KS, "decoding": decoding}
    return {"model": "tiny", "settings": settings, "versions": {"torch": "2"}, "arms": arms}


class Text(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.said = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "link"):
            self.open.append(tag)
        assert not {name for name, _ in attrs} & {"src", "onload", "onclick"}

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.said.append(data)


def test_the_page(result):
    page = render(result)
    assert page == render(result)
    parsed = Text()
    parsed.feed(page)
    assert not parsed.open
    said = " ".join(" ".join(parsed.said).split())
    assert "bias<b> is ahead at k = 1, base at k = 8" in said and "bias<b>" not in page
    assert "20 tasks of gsm8k" in said and "temperature 0.6, top-p 0.95" in said
    assert "60.0% (40.0 to 80.0)" in said  # pass@1 of the arm
    assert "25.0% (25.0 to 25.0)" in said
    assert page.count('role="img"') == 2 and page.count('class="band"') == 5
    assert not re.search(r"https?://", page.replace("http://www.w3.org", ""))
    assert "not measured" in said  # no right solution of the last arm, so no perplexity of these


def test_the_findings(result):
    first, last = findings(result)
    assert first.endswith("Tasks solved at least once by bias<b> alone: 0, by the base alone: 8.")
    assert "base is ahead from k = 1 to k = 8" in last


def test_the_tables(result):
    found = tables(result)
    assert [t.title.split(",")[0] for t in found] == [
        "pass@k", "difference to the base", "tasks solved at least once", "perplexity under the base",
    ]  # fmt: skip
    assert [len(t.columns) for t in found] == [4, 3, 5, 4] and [t.row_count for t in found] == [4, 4, 2, 3]
    assert list(found[0].columns[2].cells) == [
        words.with_interval(read, "share") for read in result["arms"]["bias<b>"]["passk"].values()
    ]
    alone = result | {"arms": {"base": result["arms"]["base"]}}
    assert len(tables(alone)) == 2 and findings(alone) == []
    assert "nothing was compared" in render(alone)


@pytest.mark.parametrize("samples", [1, 8, 1024])
def test_labels_stay_in_their_panels(result, samples):
    ks = [2**i for i in range(samples.bit_length())]
    same = {"tokens": 10, "loops": 0.0, "closed": True, "nats": 2.0}
    rows = [
        same | {"task_id": f"t{task}", "sample": i, "correct": i % 7 == task}
        for task in range(2)
        for i in range(samples)
    ]
    as_text = lambda curve: {str(k): v for k, v in curve.items()}  # noqa: E731
    found = summary(rows, ks)
    beside = against("arm", rows, rows, ks)
    arm = {"kind": "base", "source": "x"} | found | {"passk": as_text(found["passk"])}
    other = arm | {"against_base": beside | {"difference": as_text(beside["difference"])}}
    arms = {"base": arm, "a-method-with-a-very-long-name-indeed": other}
    check_labels(render(result | {"arms": arms, "settings": result["settings"] | {"samples": samples, "ks": ks}}))
