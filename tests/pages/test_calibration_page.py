"""The pages of calibrate.json and audit.json say what these files say, whatever is missing in them."""

import copy
from xml.etree import ElementTree

import pytest
from labels import check_labels

from steerable.pages import audit_page, calibration_page

LAW = {"coefficient": [0.2, 0.1, 0.3], "r2": 0.9, "tasks": 20}


def row(arm, strength, gain, kl, broken=()):
    shares = {name: [0.1, 0.0, 0.2] for name in ("target", "accuracy", "loops", "unclosed")}
    return {"arm": arm, "layers": [2], "strength": strength, "dose": 0.3 * strength, "tasks": 20,
            "broken": list(broken), "gain": [gain, gain - 0.1, gain + 0.1], "kl": [kl, kl / 2, 2 * kl],
            "tokens": [90.0, 80.0, 99.0], "thinking": [80.0, 70.0, 90.0], "perplexity": [1.1, 1.0, 1.2],
            **shares}  # fmt: skip


@pytest.fixture
def result():
    names = ["v<b>, layer 2", "v<b>, layer 3"]
    grid = [row(names[0], 0.5, 0.1, 0.01), row(names[0], 1.0, 0.2, 0.05, ["kl"]), row(names[1], 1, 0.1, 0.02)]
    equal = {"at": 0.02, "gains": dict.fromkeys(names, [0.1, 0.0, 0.2]), "best": names[0]}
    equal["behind"] = dict.fromkeys(names, [0.0, -0.1, 0.1])
    limits = {"kl": 0.05, "perplexity": 2.0, "loops": 0.1, "unclosed": 0.1, "accuracy": 0.1}
    best = {"arm": names[0], "layers": [2], "strength": 1.0, "dose": 0.3}
    lost = {"steps": 1, "lost": [0.01, -0.02, 0.03], "step": 0.04, "best": best}
    return {
        "model": "tiny", "tasks": 20, "grid": grid, "front": [0, 1], "equal_kl": equal, "equal_dose": None,
        "arms": [{"name": name, "law": {"gain": LAW, "kl": LAW, "accuracy": None}} for name in names],
        "settings": {"target": "doubt", "aim": "more", "strengths": [0.5, 1.0], "limits": limits, "tasks": "gsm8k"},
        "rounds": [{"tasks": 4, "settings": 3, "survivors": [best]}],
        "cost": {"search": 1000, "grid": 5000, "share": 0.2, **lost},
        "recommended": {**grid[0], "random": {"gain": [0.0, -0.1, 0.1]}}, "reason": "",
    }  # fmt: skip


def parsed(page):
    """The page's body as XML; anything that is not closed fails."""
    return ElementTree.fromstring(page[page.index("<body>") : page.index("</html>")].replace("&nbsp;", " "))


def test_a_metric_of_ones_own_has_its_unit_and_unread_chains_are_told(result):
    result["settings"] |= {"target": "waits", "unit": "number"}
    result["grid"][0]["dropped"] = 3
    text = " ".join("".join(parsed(calibration_page.render(result)).itertext()).split())
    assert "more waits by +0.1 (0 to +0.2), at" in text and "20 (3 chains unread)" in text


def test_the_calibration_page(result):
    page = calibration_page.render(result)
    assert page == calibration_page.render(copy.deepcopy(result))
    text = " ".join("".join(parsed(page).itertext()).split())
    assert "Recommended: v<b>, layer 2, strength +0.5" in text and "more doubt by +10.0 points" in text
    assert "20.0% of the full grid's 5 000. The full grid's choice is 1 step away" in text
    assert "+1.0 points (−2.0 to +3.0), where one step of the grid changes +4.0 points" in text
    assert "not measured" in text  # the accuracy's law
    check_labels(page)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"steps": 0}, "and chose the full grid's setting"),
        ({"steps": None}, "is in another arm"),
        ({"best": None}, "on the full grid no setting would be recommended"),
        ({"lost": None, "steps": None}, "on the full grid v<b>, layer 2 at +1 would be recommended"),
        ({"grid": None, "share": None}, "--full-grid shows what"),
        ({"search": None}, ""),
    ],
)
def test_the_cost_in_words(result, change, text):
    result["cost"] |= change
    said = calibration_page.cost(result)
    assert text in said and bool(said) == bool(text)


def test_nothing_recommended_and_one_arm(result):
    result |= {
        "recommended": None,
        "reason": "every setting breaks a limit",
        "equal_kl": None,
        "front": [],
        "rounds": [],
    }
    result["settings"]["target"] = "tokens"
    text = "".join(parsed(calibration_page.render(result)).itertext())
    assert "No setting is recommended: every setting breaks a limit." in text
    assert calibration_page.tables(result)


def test_the_audit_page():
    names = ("halves", "effect", "linearity", "turns", "drift")
    checks = [
        {"name": n, "title": n, "status": "not checked", "figure": "no <data>", "threshold": "", "values": {}}
        for n in names
    ]
    result = {"file": "v", "model": "tiny", "behaviour": "", "method": "m", "sites": ["resid_post.2"], "strength": 1.0,
              "effect_of": "x", "verdict": "weak", "reasons": [], "checks": checks}  # fmt: skip
    text = "".join(parsed(audit_page.render(result)).itertext())
    assert "no <data>" in text and text.count("not measured") == 3  # three figures
    assert audit_page.sentence(result) == "v is weak: nothing could be checked."
    interval = [0.2, 0.1, 0.3]
    checks[1] |= {"status": "pass", "values": {"random": interval, "shuffled": None}}
    effects = {"-1": [-0.2, -0.3, -0.1], "1": interval, "0.5": None}
    checks[2] |= {"status": "warn", "values": {"coefficient": interval, "effects": effects}}
    checks[3] |= {"status": "fail", "values": {"margins": [1.0, 0.5]}}
    page = audit_page.render(result)
    assert page.count("<svg role=") == 2 and "✗ failed" in page and "! doubtful" in page
    check_labels(page)
