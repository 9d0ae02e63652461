"""The page: complete, self-contained, honest about what is missing."""

import copy
import json
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from labels import check_labels

from steerable.models import loading as models
from steerable.pages import render, words, write_report
from steerable.pages.examples import Segment, columns, segments, shares
from steerable.pages.words import Interval
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import SteerableError, UsageError

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Sound(HTMLParser):
    """Every tag closed in order; collects the text and whatever would be fetched."""

    def __init__(self, page):
        super().__init__()
        self.open, self.words, self.fetched = [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.fetched += [
            v for k, v in attrs if k in ("src", "href") and not v.startswith(("#", "data:", "timings.json"))
        ]
        assert tag != "script"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)


def test_the_page_is_sound_small_and_fetches_nothing(report, timings):
    page = render(report, timings)
    assert Sound(page).fetched == []
    assert "url(" not in page.replace("url(#hatch)", "") and "@import" not in page
    assert len(page.encode()) < 400_000


def test_pages_know_nothing_of_torch(report):
    """Four pages are imported and one is drawn in a process of its own."""
    report["metrics"] = {"accuracy": {"title": "Accuracy", "unit": "share", "description": ""}}
    code = (
        "import json, sys\n"
        "from steerable.pages import lens_page, passk_page, run_page, training_page\n"
        "assert 'Accuracy' in run_page.render(json.load(sys.stdin))\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], input=json.dumps(report), text=True, check=True)


def test_the_same_report_gives_the_same_bytes_and_is_left_alone(report):
    before = copy.deepcopy(report)
    assert render(report) == render(copy.deepcopy(before))
    assert report == before


def test_the_headline_counts_what_stands_beyond_the_controls(report):
    text = " ".join(Sound(render(report)).words)
    assert "At +1, all 4 vectors raise their behaviour beyond both controls (×1.8 to ×3.9)" in text
    assert "at −1, 3 of 4 vectors lower their behaviour beyond both controls (×0.28 to ×0.73)" in text
    assert "no clear difference from the controls" in text
    assert "Rank correlation with exact" in text


def test_the_cost_is_the_worst_paired_change(report):
    """By the fixture, a vector's accuracy changes by 0.024 (its place - 1.5) s - 0.13 max(s, 0)."""
    text = " ".join(Sound(render(report)).words)
    assert "Cost, at its worst: at +1 accuracy −16.6 points (−22.6 to −10.6) for backtracking" in text
    assert "at −1 accuracy −3.6 points (−9.6 to +2.4) for adding knowledge" in text
    for cell in report["cells"]:
        cell["difference"] = None
    assert "Cost" not in " ".join(Sound(render(report)).words)


def test_beside_the_means_stand_the_tasks_that_moved_the_other_way(report):
    page = render(report)
    assert page.count("the wrong way on 12.0% (4.0 to 22.0) of the tasks") == 2 * 4
    head = rows(page, "Every setting")[0]
    assert head[head.index("Fraction") + 1] == "Tasks the wrong way"
    assert head[head.index("Accuracy") + 1] == "Tasks answered worse"
    unsteered, steered = rows(page, "Every setting")[1:3]
    place = head.index("Tasks the wrong way")
    assert (unsteered[place], steered[place]) == ("", "12.0% (4.0 to 22.0)")


def rows(page, before):
    """The texts of the first table after some words."""
    table = page.split(before, 1)[1].split("<table", 1)[1].split("</table>")[0]
    lines = (re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line, re.DOTALL) for line in table.split("<tr")[1:])
    return [[" ".join(re.sub("<[^>]+>", " ", cell).split()) for cell in line] for line in lines if line]


def test_what_each_vector_does_to_every_label(report):
    up = next(c for c in report["cells"] if c["behaviour"] == "backtracking" and c["strength"] == 1)
    up["difference"]["fractions"] |= {"deduction": [-0.08, -0.09, -0.07], "initializing": [0.02, -0.01, 0.05]}
    page = render(report)
    head, *body = rows(page, "What they do to every label")
    assert [row[0] for row in body[:2]] == ["backtracking +1", "backtracking −1"] and len(body) == 2 * 4
    row = dict(zip(head, body[0], strict=True))
    assert (row["deduction"], row["initializing"], row["backtracking"]) == ("−8.0", "+2.0", "+15.3")
    assert 'title="−8.0 points (−9.0 to −7.0)"' in page and 'class="down clear"' in page
    assert 'class="unclear" title="+2.0 points (−1.0 to +5.0)"' in page and 'class="up clear own"' in page


def test_cosines_are_symmetric_with_a_diagonal_of_one(report):
    head, *body = rows(render(report), "Cosines of the vectors that were used")
    matrix = [[float(x.replace("−", "-")) for x in row[1:]] for row in body]
    assert matrix == [list(column) for column in zip(*matrix, strict=True)]
    assert [row[i] for i, row in enumerate(matrix)] == [1.0] * 4
    assert [row[0] for row in body] == [f"{name} layer {n}" for name, n in zip(head[1:], (3, 3, 2, 3), strict=True)]


def test_an_option_left_unset_is_recorded_with_what_was_used(report):
    record = dict(rows(render(report), "<summary>Configuration"))
    assert (record["dtype"], record["attention"], record["window"]) == ("default: float32", "default: sdpa", "default")
    assert words.MISSING not in record.values()


def test_what_strength_1_is(report):
    """A calibrated vector does not have the norm of the mean activation."""
    assert "Strength 1 of a vector" not in render(report)
    report["selection"]["backtracking"]["dose"], report["config"]["budget"] = 0.2, 0.05
    page = render(report)
    assert "Strength 1 of a vector is its dose in the table of choices" in page and "by 0.05 nats a token" in page
    assert "norm of the mean of its layer" not in page


def test_a_behaviour_whose_candidates_all_failed_says_why(report):
    report["selection"]["backtracking"] |= {"passed": False, "rule": "none passed: every candidate made no sense"}
    text = " ".join(Sound(render(report)).words)
    assert "Backtracking: none passed: every candidate made no sense." in text and "kept its loops" not in text


def test_points_of_fewer_tasks_stand_beside_the_unsteered_level_of_all(report):
    """Side cells are drawn by their paired change, in every figure that has the unsteered level in it."""
    for cell in report["cells"]:
        if cell["behaviour"] == "backtracking" and (abs(cell["strength"]) == 0.5 or cell["where"] == "thinking"):
            cell |= {"tasks": 12, "fractions": {"backtracking": [0.01, 0.005, 0.02]}, "accuracy": [0.1, 0.05, 0.2]}
            cell["difference"] = {"accuracy": [0.02, -0.02, 0.06], "fractions": {"backtracking": [0.1, 0.05, 0.2]}}
    page = render(report)
    for name in ("+0.5 vector on 12 tasks", "+1, layer 3, thinking positions"):
        assert f"{name}: 15.3% (10.3 to 25.3)" in page
    assert "backtracking +0.5 on 12 tasks: 64.0% (60.0 to 68.0)" in page
    assert "layer 3, thinking positions on 12 tasks" in page
    assert "; −1, 0, +1 on 50 tasks; −0.5, +0.5 on 12 tasks" in page


def test_a_look_says_so_at_the_top(report):
    assert "A quick look" not in render(report)
    page = render(report | {"look": True})
    assert page.index("A quick look") < page.index("At +1, all 4 vectors")


def test_no_ratio_to_a_share_that_may_be_zero(report):
    report["cells"][0]["fractions"]["backtracking"] = [0.01, 0.0, 0.03]
    page = render(report)
    assert page.count("no ratio, as the unsteered share may be zero") == 2 and page.count('"ratio">–<') == 2


def test_the_use_of_a_vector_runs_as_it_stands(report, tmp_path, monkeypatch, capfd, steerable):
    vector = models.load("pocket").model.model.layers[3].mlp.down_proj.weight[:, 0]
    Direction({Site("resid_post", 3): vector}, model_id="pocket").save(tmp_path / "vectors/backtracking.safetensors")
    report["config"]["max_new_tokens"] = 4
    code, *commands = (Sound(text).words[0] for text in re.findall("<pre.*?</pre>", render(report), re.DOTALL))
    assert commands[0] == "steerable chat --model pocket --steer vectors/backtracking.safetensors --strength 1"
    assert len(commands) == 4
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert "2*w + 8 = 30" in capfd.readouterr().out
    said = steerable(*shlex.split(commands[0])[1:], "--max-new-tokens", 4)
    assert said.code == 0, said.err


def test_where_the_vector_was_added_is_in_its_use(report):
    for cell in report["cells"]:
        cell["where"] = "thinking" if cell["strength"] else "all"
    report["model"]["name"] = 'it\'s "mine"'
    code, command, *_ = (Sound(text).words[0] for text in re.findall("<pre.*?</pre>", render(report), re.DOTALL))
    assert 'st.load("it\'s \\"mine\\"")' in code and 'strength=1, where="thinking", tokenizer' in code
    assert shlex.split(command)[3] == report["model"]["name"] and command.endswith("--where thinking")


def test_without_controls_the_headline_claims_nothing(report):
    report["cells"] = [c for c in report["cells"] if c["control"] is None]
    page = render(report)
    assert "beyond both controls" not in page and "controls not measured" in page


PARTS = ("config", "versions", "model", "hashes", "coverage", "norms", "cosines", "attribution")
PARTS += ("selection", "cells", "examples", "lens")


@pytest.mark.parametrize("gone", PARTS)
@pytest.mark.parametrize("how", ["missing", "null", "empty"])
def test_every_part_may_be_missing(report, gone, how):
    if how == "missing":
        del report[gone]
    else:
        report[gone] = None if how == "null" else type(report[gone])()
    Sound(render(report))


def test_nothing_at_all_still_makes_a_page():
    page = render({})
    Sound(page)
    assert words.MISSING in page


def nulls(value):
    """Every number inside a measurement becomes null."""
    if isinstance(value, dict):
        return {k: nulls(v) for k, v in value.items()}
    if isinstance(value, list):
        return [nulls(v) for v in value]
    return None if isinstance(value, float) else value


@pytest.mark.parametrize("part", ["norms", "cosines", "attribution", "lens"])
def test_null_numbers_are_not_measured(report, part):
    report[part] = nulls(report[part])
    Sound(render(report))


def test_null_metrics_of_a_cell_are_not_zero(report):
    for cell in report["cells"]:
        cell |= {
            "fractions": None,
            "accuracy": None,
            "tokens": None,
            "loops": None,
            "unclosed": None,
            "kl": None,
        }
    page = render(report)
    assert words.MISSING in page and not re.search(r"[>: ]0\.0%", page)


def test_one_direction_alone_may_be_measured(report):
    report["cells"] = [c for c in report["cells"] if c["strength"] <= 0]
    assert "−1" in " ".join(Sound(render(report)).words)


def test_a_metric_of_somebody_else_is_drawn_and_tabled(report):
    """The report says itself what its metrics are: no page has a list of them."""
    report["metrics"] = {"waits": {"title": "Waits", "unit": "number", "description": "of “wait” a chain"}}
    for i, cell in enumerate(report["cells"]):
        cell["waits"] = [i + 0.25, i - 1.0, i + 1.5]
    page = render(report)
    assert "Waits against steering strength" in page and '<th scope="col">Waits</th>' in page
    assert "1.25 (0 to 2.5)" in page and "Accuracy against" not in page


def test_text_of_the_model_cannot_become_markup(report):
    attack = "</p><script>alert(1)</script><img src=x>"
    report["examples"][0]["plus"]["thinking"] = attack
    report["examples"][0]["prompt"] = attack
    report["model"]["name"] = attack
    report["examples"][0]["rule"] = attack
    report["lens"]["backtracking"]["top"][0][0] = attack
    assert Sound(render(report)).fetched == []


def test_other_labels_and_shared_random_cells(report):
    text = json.dumps(report).replace("example-testing", "self-praise")
    other = json.loads(text)
    for cell in other["cells"]:
        if cell["control"] == "random":
            cell["behaviour"] = None
    page = render(other)
    Sound(page)
    assert "self-praise" in page


def test_write_report(tmp_path, report, timings):
    with pytest.raises(UsageError, match=r"no report\.json"):
        write_report(tmp_path)
    (tmp_path / "report.json").write_text(json.dumps(report))
    written = write_report(tmp_path)
    assert written == tmp_path / "report.html" and written.read_text(encoding="utf-8") == render(report)
    (tmp_path / "timings.json").write_text(json.dumps(timings))
    assert "seconds.generate" in write_report(tmp_path).read_text(encoding="utf-8")
    for broken in ("{", "[]"):
        (tmp_path / "report.json").write_text(broken)
        with pytest.raises(SteerableError, match=r"report\.json"):
            write_report(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json", "timings.json"]


def span(label, start, end):
    return {"label": label, "start": start, "end": end}


def test_segments_lose_no_text():
    text = "abcdefghij"
    spans = [span("y", 4, 6), span("x", 1, 3), span("z", 5, 8), span("w", 9, 99), span("v", 3, 3)]
    cut = segments(text, spans)
    assert "".join(piece.text for piece in cut) == text
    assert cut == [
        Segment("a", None),
        Segment("bc", "x"),
        Segment("d", None),
        Segment("e", "y"),
        Segment("fgh", "z"),
        Segment("i", None),
        Segment("j", "w"),
    ]
    assert shares(cut, ["y", "x"]) == [("y", 1 / 7), ("x", 2 / 7), ("w", 1 / 7), ("z", 3 / 7)]
    assert segments("", []) == [] and shares([], ["x"]) == []


def test_columns_leave_out_a_missing_chain():
    found = columns({"before": {"thinking": "t"}, "after": None}, {"before": "Before", "after": "After"}, [])
    assert [(c.title, c.answer, c.correct) for c in found] == [("Before", "", None)]


@pytest.mark.parametrize(
    ("made", "wanted"),
    [
        (words.percent(0.2061), "20.6%"),
        (words.signed(-0.5), "−0.5"),
        (words.signed(1.0), "+1"),
        (words.number(2703744), "2\u202f703\u202f744"),
        (words.number(0.00001234), "1.23e−05"),
        (words.times(0.284), "×0.28"),
        (words.points(-0.00049), "0"),
        (words.points(-0.0005), "−0.1"),
        (words.times(None), "not measured"),
        (words.layers([2, 3, 4]), "layers 2–4"),
        (words.layers([1, 4]), "layers 1, 4"),
        (words.with_interval(Interval(0.2, 0.1, 0.3), "share"), "20.0% (10.0 to 30.0)"),
        (words.with_interval(None, "share"), "not measured"),
        (words.value([None, True, 1.5]), "not measured, yes, 1.5"),
        (list(words.flat({"a": {"b": 2025}, "c": {}})), [("a.b", "2025"), ("c", "none")]),
    ],
)
def test_words(made, wanted):
    assert made == wanted


@pytest.mark.parametrize(("text", "shown"), [(" wait", "␣wait"), ("\n\n", "↵↵"), ("\t", "⇥"), ("a b", "a␣b")])
def test_white_space_is_shown(text, shown):
    assert words.visible(text) == shown


def test_the_page_has_no_colour_outside_its_variables(report):
    drawings = re.sub(r"<style>.*?</style>", "", render(report), flags=re.S)
    assert not re.search(r"(fill|stroke|color)=|#[0-9a-f]{6}\b", drawings.replace("url(#hatch)", ""))


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e6])
@pytest.mark.parametrize("layers", [6, 40, 120])
def test_labels_stay_in_their_panels(report_of, layers, scale):
    report = report_of(layers)
    report["norms"] = {at: {k: v * scale for k, v in both.items()} for at, both in report["norms"].items()}
    for cell in report["cells"]:
        cell["where"] = "thinking & ~onset:backtracking" if cell["where"] == "thinking" else cell["where"]
        cell["strength"] *= 0.123456
        for metric in ("tokens", "kl"):
            cell[metric] = cell[metric] and [x * scale for x in cell[metric]]
    check_labels(render(report))
