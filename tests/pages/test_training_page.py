"""The page of a training says what report.json and log.jsonl of its run folder say."""

import copy
import itertools
import json
import math
import re
from html.parser import HTMLParser

import pytest
from labels import check_labels

from steerable.chains.records import LABELS
from steerable.pages.training_page import headline, render

BASE = dict(zip(LABELS, (0.2, 0.5, 0.08, 0.11, 0.06, 0.05), strict=True))
AFTER = dict(zip(LABELS, (0.15, 0.49, 0.07, 0.15, 0.06, 0.08), strict=True))


def around(mean, width=0.02):
    return [mean, mean - width, mean + width]


def cell(accuracy, tokens, fractions, samples):
    return {
        "tasks": 128,
        "samples": samples,
        "dropped": 0,
        "fractions": {label: around(share) for label, share in fractions.items()},
        "accuracy": around(accuracy, 0.05),
        "tokens": around(tokens, 8.0),
        "loops": [0.012, 0.008, 0.02],
        "unclosed": [0.0, 0.0, 0.0],
    }


def difference(accuracy):
    return {
        "accuracy": around(accuracy, 0.04),
        "tokens": around(14.0, 6.0),
        "loops": None,
        "unclosed": [0.0, 0.0, 0.0],
        "fractions": {label: around(AFTER[label] - BASE[label]) for label in LABELS},
    }


def chain(answer, correct):
    text = "I need 24 <b>now</b>. Wait, that fails."
    spans = [{"label": LABELS[0], "start": 0, "end": 21}, {"label": LABELS[5], "start": 22, "end": 39}]
    return {"thinking": text, "answer": answer, "correct": correct, "spans": spans}


REPORT = {
    "base": {"greedy": cell(0.5, 104, BASE, 1), "sampled": cell(0.4, 110, BASE, 4)},
    "bias": {
        "greedy": cell(0.53, 111, AFTER, 1),
        "sampled": cell(0.613, 124, AFTER, 4),
        "trainable_parameters": 1152,
    },
    "difference": {"greedy": difference(0.03), "sampled": difference(0.213)},
    "controls": {
        name: {
            "greedy": cell(0.5, 100, BASE, 1),
            "sampled": cell(0.37, 100, BASE, 4),
            "difference": {"greedy": {"accuracy": around(0.03, 0.04)}, "sampled": {"accuracy": around(0.243, 0.04)}},
            "token": " Okay",
        }
        for name in ("shuffled", "random", "prefix")
    },
    "examples": [
        {"task_id": "t7", "prompt": "Make 24 of <3>, 5, 8", "base": chain("23", False), "trained": chain("24", True)}
    ],
    "training": {
        "steps": 60,
        "trainable_parameters": 1152,
        "optimizer_bytes": 9240,
        "seconds_per_step": {"generation": 3.6, "reward": 0.1, "kl": 0.8, "update": 4.5},
        "steps_skipped": 2,
        "curve": {"step": [1, 2], "reward": [-0.2, -0.1], "accuracy": [0.4, 0.45]},
    },
    "config": {"model": "pocket", "method": "bias", "tasks": "pocket", "reward": "correct", "temperature": 1.0,
               "seed": 0, "layers": None, "after": "mlp", "rank": None, "annotator": "pocket"},
    "versions": {"torch": "2.13"},
    "model": {"name": "pocket", "layers": 6},
}  # fmt: skip


def line(step):
    right = 0.4 + 0.2 * step / 60 + 0.05 * math.sin(3 * step)
    return {
        "step": step,
        "reward": 2 * right - 1,
        "accuracy": right,
        "tokens": 105 + step / 3 + 6 * math.sin(5 * step),
        "truncated": 0.0,
        "kl": 0.0005 * step,
        "entropy": 0.45 - 0.001 * step,
        "flat_groups": 0.3,
        "loss": 0.01,
        "gradient_norm": 0.0005,
        "reasons": {"right": right, "wrong": 1 - right, "no-answer": 0.0},
        "seconds": {"generation": 3.6},
        "tokens_per_second": 3600.0,
    }


LOG = [line(step) for step in range(1, 61)]


class Text(HTMLParser):
    """The page's words; asserts that tags are balanced and nothing is loaded or run."""

    def __init__(self):
        super().__init__()
        self.open, self.said = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "link"):
            self.open.append(tag)
        assert tag != "script" and not {name for name, _ in attrs} & {"src", "onload", "onclick"}

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.said.append(data)


def words_of(page):
    parsed = Text()
    parsed.feed(page)
    assert not parsed.open
    return " ".join(" ".join(parsed.said).split())


def test_the_page_says_what_the_folder_says():
    page = render(REPORT, LOG)
    assert page == render(REPORT, LOG)
    said = words_of(page)
    assert (
        "One vector after the MLP of each of the 6 layers (1 152 numbers), trained for 60 steps "
        "by reinforcement learning on right answers. Right answers: sampled 40.0% → 61.3%, +21.3 points "
        "(+17.3 to +25.3); greedy 50.0% → 53.0%, +3.0 points (−1.0 to +7.0)."
    ) in said
    assert "judged on 128 unseen tasks" in said and "4 chains for each of 128 tasks" in said
    assert "a gain" in said and "no clear difference" in said
    # Paired differences decide what was amplified: their intervals are the difference ± 0.02.
    assert "amplified: example testing (×1.4), backtracking (×1.6); reduced: initializing (×0.75)." in said
    assert "begin with “␣Okay”" in said and said.count("37.0% (32.0 to 42.0) +24.3 points (+20.3 to +28.3)") == 3
    assert "Wait, that fails." in said and "<b>now</b>" in said and "<b>now" not in page
    assert "Wrong before, right after t7" in said and "✗ wrong" in said and "✓ right" in said
    assert "A step took 9 s" in said and "9.24 KB" in said and "2 steps were skipped" in said
    assert "3 600 tokens a second" in said
    assert "update 4.5 s, 50.0%" in said
    assert "rank default" in said and said.count("not measured") == 2  # loops
    assert "First 6 steps" in said and "no answer" in said
    # six behaviours, and a curve of reward, accuracy, length, cut off, KL, entropy, flat groups, gradient
    assert page.count('role="img"') == 6 + 8 + 1 + 2
    assert not re.search(r"https?://", page.replace("http://www.w3.org", ""))
    assert 'id="lens"' not in page


def test_what_was_not_measured_is_said():
    bare = {"config": {"method": "full", "reward": "random"}, "training": {}}
    said = words_of(render(bare))
    assert said.count("not measured") >= 10 and "Every weight, trained by reinforcement learning" in said
    assert "A control: rewards were drawn by lot." in said
    few = words_of(render({**REPORT, "examples": None}, []))  # then the curves are those that report.json keeps
    assert "One task, two answers" not in few and "Right answers" in few


def test_labels_are_the_annotators():
    """Any names, in the order of the report, each with the same colour in its panel and in the chains."""
    report = json.loads(json.dumps(REPORT).replace(LABELS[0], "reflection").replace(LABELS[5], "transition"))
    for cell in (report[arm][d]["fractions"] for arm in ("base", "bias") for d in ("greedy", "sampled")):
        for label in LABELS[1:5]:
            del cell[label]
    page = render(report, LOG)
    assert "amplified: transition (×1.6); reduced: reflection (×0.75)." in words_of(page)
    assert page.count('role="img"') == 2 + 8 + 1 + 2
    assert page.count("vector hue-2") == page.count("vector hue-3") > 0 == page.count("vector hue-0")


def test_no_ratio_to_a_share_that_may_be_zero():
    report = copy.deepcopy(REPORT)
    report["base"]["sampled"]["fractions"]["backtracking"] = [0.01, 0.0, 0.03]
    page = render(report)
    assert "backtracking (+3.0 points)" in words_of(page)
    assert page.count('class="value middle">–<') == 1


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"layers": "3"}, "One vector after the MLP of layer 3 ("),
        ({"layers": "2,4", "after": "attention"}, "One vector after the attention of layers 2,4 ("),
        ({"rank": 2}, "One vector after the MLP of each of the 6 layers, of rank 2 together ("),
        ({"reward": "format"}, "trained for 60 steps by reinforcement learning on readable answers"),
        ({"prefix_tokens": 8}, "for 60 steps on the first 8 tokens of own solutions, without a reward"),
    ],
)
def test_the_headline_names_what_was_trained(config, expected):
    assert expected in headline({**REPORT, "config": REPORT["config"] | config})


def test_lora_is_read_under_its_own_name():
    arm = REPORT["bias"]
    report = {k: v for k, v in REPORT.items() if k != "bias"} | {"lora": arm}
    report["config"] = report["config"] | {"method": "lora", "rank": None}
    said = headline(report)
    assert said.startswith("LoRA of rank 4 on the MLP’s last projection in each of the 6 layers") and "61.3%" in said


def extreme(steps, scale, **more):
    return [
        LOG[0] | {"step": step, "gradient_norm": scale * (1 + 0.3 * math.sin(step)), "kl": scale * step} | more
        for step in range(1, steps + 1)
    ]


@pytest.mark.parametrize(
    ("steps", "scale"),
    [*itertools.product([1, 2, 39], [1e-9, 3.7e-5, 0.00025, 1.0, 1e6, -0.123456]), (500, 3.7e-5), (500, -0.123456)],
)
def test_labels_stay_in_their_panels(steps, scale):
    check_labels(render(REPORT, extreme(steps, scale, tokens=123456.0, entropy=-scale)))


def test_steps_are_whole_numbers():
    ticks = re.findall(r'class="tick middle">([^<]*)<', render(REPORT, extreme(1, 1.0)))
    assert "1" in ticks and not [tick for tick in ticks if "." in tick]


def test_what_is_no_number_is_not_drawn():
    rows = [LOG[i] | {"kl": None, "entropy": math.nan, "gradient_norm": math.inf if i else 1e-300} for i in range(3)]
    drawn = render(REPORT, rows)
    check_labels(drawn)
    panels = re.findall(r"<figcaption>(.*?)</figcaption>", drawn)
    assert "Gradient" in panels and "Entropy" not in panels and "Divergence" not in panels


def test_one_of_a_thing_is_no_plural():
    report = copy.deepcopy(REPORT)
    report["training"] |= {"steps": 1, "steps_skipped": 1, "trainable_parameters": 1}
    report["model"]["layers"] = 1
    for decoding in ("greedy", "sampled"):
        report["base"][decoding] |= {"tasks": 1, "samples": 1}
    said = render(report, extreme(1, 1.0))
    assert re.findall(r"\b1 (?:\w+ )?(?:steps|tasks|chains|layers|numbers)\b", said) == []
    assert "trained for 1 step " in said and "1 layer<" in said and "judged on 1 unseen task<" in said
    assert "1 chain for each of 1 task" in said and "after the MLP of the one layer" in said
    report["training"] |= {"steps": 3}
    assert "1 step was skipped" in render(report, extreme(3, 1.0))
