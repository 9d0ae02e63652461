import json
import os
import re
import subprocess
import sys

import pytest
import torch
from hub_server import TOKEN, hub
from huggingface_hub import ModelCard

from steerable.jobs.publish import from_pretrained, load_all, model_card, push_to_hub, save_pretrained
from steerable.steering.direction import Direction
from steerable.steering.site import Site
from steerable.store.errors import SteerableError, UsageError
from steerable.store.run_folder import sha256


def make(behaviour="backtracking", layer=3, **about):
    generator = torch.Generator().manual_seed(layer)
    site = Site("resid_post", layer)
    options = {"model_id": "org/Model-1.5B", "licence": "Apache-2.0", "strength": 0.5, "norms": {site: 12.5}} | about
    return Direction({site: torch.randn(8, generator=generator)}, behaviour=behaviour, **options)


def cell(behaviour, control, strength, share, layers=(3,), where="all"):
    return {
        "behaviour": behaviour, "control": control, "strength": strength, "layers": list(layers), "where": where,
        "tasks": 50, "samples": 4, "fractions": {"backtracking": [share, share - 0.01, share + 0.01]},
        "accuracy": [0.62, 0.57, 0.67], "tokens": [118.0, 111.0, 125.0], "loops": [0.01, 0.0, 0.02],
        "unclosed": None, "kl": None,
    }  # fmt: skip


REPORT = {
    "config": {"model": "org/Model-1.5B"},
    "cells": [
        cell(None, None, 0.0, 0.053, ()),
        cell("backtracking", None, 1.0, 0.206),
        cell("backtracking", "random", 1.0, 0.057),
        cell("backtracking", "shuffled", 1.0, 0.061),
        cell("backtracking", None, 1.0, 0.199, (2, 3, 4)),
        cell("deduction", None, 1.0, 0.9),
    ],
}


def test_a_folder(tmp_path):
    direction = make()
    paths = save_pretrained(direction, tmp_path / "new")
    assert [p.name for p in paths] == ["backtracking.safetensors", "README.md"]
    again = from_pretrained(tmp_path / "new")
    assert again.to_bytes() == direction.to_bytes()
    assert paths[1].read_text() == model_card(direction)
    save_pretrained(direction, tmp_path / "other")
    assert [p.read_bytes() for p in paths] == [(tmp_path / "other" / p.name).read_bytes() for p in paths]


def test_several_in_a_folder(tmp_path):
    several = {"up": make(), "down": make("deduction", 4)}
    save_pretrained(several, tmp_path)
    assert {name: d.to_bytes() for name, d in load_all(tmp_path).items()} == {
        name: d.to_bytes() for name, d in several.items()
    }
    assert from_pretrained(tmp_path, filename="down").behaviour == "deduction"
    assert from_pretrained(str(tmp_path), filename="up.safetensors").behaviour == "backtracking"
    with pytest.raises(UsageError, match="one of down.safetensors, up.safetensors"):
        from_pretrained(tmp_path)
    with pytest.raises(UsageError, match="has no x.safetensors"):
        from_pretrained(tmp_path, filename="x")


def test_what_is_refused(tmp_path):
    with pytest.raises(UsageError, match="neither|no folder"):
        from_pretrained(tmp_path / "missing")
    with pytest.raises(UsageError, match="holds no direction files"):
        from_pretrained(tmp_path)
    with pytest.raises(UsageError, match="cannot name a file"):
        save_pretrained({"../a": make()}, tmp_path)
    with pytest.raises(UsageError, match="no direction to save"):
        save_pretrained({}, tmp_path)
    with pytest.raises(UsageError, match="different licences"):
        save_pretrained({"a": make(), "b": make(licence="MIT")}, tmp_path)
    with pytest.raises(UsageError, match="owner/name"):
        push_to_hub(make(), "no-owner")
    with pytest.raises(UsageError, match="report"):
        save_pretrained(make(), tmp_path, report=tmp_path / "none.json")
    assert not list(tmp_path.iterdir())
    (tmp_path / "a.safetensors").write_bytes(b"x" * 40)
    with pytest.raises(SteerableError, match="a.safetensors is not a sound"):
        from_pretrained(tmp_path)


def test_the_card_is_one_for_the_hub(tmp_path):
    save_pretrained(make(behaviour='un"certain|ty: #1', gate="thinking"), tmp_path, report=REPORT)
    card = ModelCard.load(tmp_path / "README.md")  # parses the header and its evaluation results
    data = card.data.to_dict()
    assert data["license"] == "apache-2.0" and data["base_model"] == "org/Model-1.5B"
    assert data["base_model_relation"] == "adapter" and data["library_name"] == "steerable"
    assert data["tags"][:3] == ["steering-vector", "activation-steering", "steerable"]
    assert data["tags"][3] == "un-certain-ty-1"
    for said in ("resid_post 3", "`thinking`", "| 0.5 |", "Apache-2.0", "from_pretrained", "did not steer with these"):
        assert said in card.text, said
    other = ModelCard(model_card(make(licence="My Own 2", model_id="pocket")))
    assert (other.data.license, other.data.license_name) == ("other", "my-own-2") and "base_model" not in other.content
    none = ModelCard(model_card(make(licence="")))
    assert none.data.license is None and "Not stated" in none.text and "None was given" in none.text
    two = ModelCard(model_card({"a": make(), "b": make(model_id="org/other")}))
    assert two.data.base_model == ["org/Model-1.5B", "org/other"] and 'filename="a"' in two.text


def test_the_card_shows_controls_beside_every_claim(tmp_path):
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    for report in (REPORT, tmp_path, tmp_path / "report.json"):
        text = model_card(make(), report=report)
        rows = [line for line in text.splitlines() if re.match(r"\| (none|this one|random|shuffled) ", line)]
        assert [row.split(" | ")[2] for row in rows] == ["50 x 4"] * 4
        assert [row.split(" | ")[3] for row in rows] == [
            "0.053 (0.043 to 0.063)",
            "0.206 (0.196 to 0.216)",
            "0.057 (0.047 to 0.067)",
            "0.061 (0.051 to 0.071)",
        ]
        assert all("0.62 (0.57 to 0.67)" in row and "not measured" in row for row in rows)
        assert "0.199" not in text  # another vector: more layers than this direction has
        assert "0.9 (" not in text  # another behaviour
        assert "does not show whether with these very files" in text
    hashes = {"vectors/backtracking.safetensors": sha256(make().save(tmp_path / "a.safetensors"))}
    assert "`org/Model-1.5B` with these very files, on tasks" in model_card(make(), report=REPORT | {"hashes": hashes})


def test_the_snippet_runs(tmp_path, monkeypatch, capsys):
    import steerable as st

    model, _ = st.load("pocket")
    direction = Direction({Site("resid_post", 2): torch.ones(model.config.hidden_size)}, model_id="pocket")
    save_pretrained(direction, tmp_path)
    code = re.search(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.S)[1]
    monkeypatch.chdir(tmp_path)
    exec(code.replace("folder/or/owner/name", ".").replace("max_new_tokens=500", "max_new_tokens=2"), {})
    assert capsys.readouterr().out.strip()


PUSH_AND_PULL = """
import json, sys, torch, steerable as st
from steerable.jobs.publish import load_all
work = sys.argv[1]
directions = load_all(work)
said = {}
said["url"] = st.push_to_hub(directions, "me/vectors", report=json.load(open(work + "/report.json")), private=True)
said["again"] = st.push_to_hub(directions["up"], "me/vectors", revision="v2", commit_message="second")
said["pulled"] = {name: d.to_bytes() == directions[name].to_bytes() for name, d in load_all("me/vectors").items()}
one = st.from_pretrained("me/vectors", filename="down", revision="main")
said["one"] = one.to_bytes() == directions["down"].to_bytes()
def refused(call):
    try:
        call()
    except st.SteerableError as error:
        return [type(error).__name__, str(error)]
said["several"] = refused(lambda: st.from_pretrained("me/vectors"))
said["no revision"] = refused(lambda: st.from_pretrained("me/vectors", filename="up", revision="v9"))
said["no repository"] = refused(lambda: st.from_pretrained("me/nothing"))
said["wrong token"] = refused(lambda: st.push_to_hub(directions["up"], "me/new", token="hf_wrongwrongwrong"))
print(json.dumps(said))
"""


@pytest.mark.slow
def test_push_and_pull(tmp_path):
    """The real client against a real server that speaks the hub's protocol."""
    save_pretrained({"up": make(), "down": make("deduction", 4)}, tmp_path / "work")
    (tmp_path / "work" / "report.json").write_text(json.dumps(REPORT))
    with hub() as server:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {
            "HF_ENDPOINT": server.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        }  # fmt: skip
        command = [sys.executable, "-c", PUSH_AND_PULL, str(tmp_path / "work")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        branches = server.repos.get("me/vectors", {})
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["pulled"] == {"up": True, "down": True} and said["one"]
    assert said["url"].endswith(f"/me/vectors/commit/{branches['main'][0]}") and said["again"].endswith(
        branches["v2"][0]
    )
    assert ("POST", "/api/validate-yaml") in server.requests  # the client had the card's header checked
    files = branches["main"][1]
    assert set(files) == {"up.safetensors", "down.safetensors", "README.md"}
    assert files["up.safetensors"] == (tmp_path / "work" / "up.safetensors").read_bytes()
    card = ModelCard(files["README.md"].decode())
    assert 'from_pretrained("me/vectors", filename="down")' in card.text and "0.206" in card.text
    assert [said[k][0] for k in ("several", "no revision", "no repository", "wrong token")] == ["UsageError"] * 4
    assert "no such revision" in said["no revision"][1] and "no hub repository" in said["no repository"][1]
    assert "log in" in said["wrong token"][1] and "me/new" not in server.repos
    everything = done.stdout + done.stderr + "".join(map(str, server.requests))
    assert TOKEN not in everything and "hf_wrong" not in everything
    left = [p for p in tmp_path.rglob("*") if p.is_file() and TOKEN.encode() in p.read_bytes()]
    assert not left
