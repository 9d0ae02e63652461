"""The text of a model card for steering vectors."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from steerable.formats.exchange import layers_text
from steerable.pages.cells import Cell, Interval, doses, measured, setting_of, unsteered
from steerable.steering.direction import Direction
from steerable.store.text import one_line

#: SPDX names that the hub knows, by their lower-case form; others are "other" with their name beside.
_LICENCES = {
    "apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0",
    "gpl-3.0", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "unlicense", "openrail", "llama3", "llama3.1", "llama3.2",
    "llama3.3", "gemma",
}  # fmt: skip
_METRICS = (("accuracy", "accuracy"), ("tokens", "tokens"), ("loops", "loops"), ("unclosed", "unclosed"))


def text(
    named: Mapping[str, Direction], report: Mapping[str, Any], licence: str, repo_id: str, tags: Sequence[str]
) -> str:
    """Header and body; every number stands beside where it comes from."""
    behaviours = [one_line(d.behaviour) for d in named.values() if d.behaviour]
    title = f"Steering vectors: {', '.join(dict.fromkeys(behaviours)) or 'unnamed'}"
    parts = [
        f"---\n{_header(named, licence, tags)}\n---\n",
        f"# {title}\n",
        "Vectors to be added to the residual stream of a language model while it generates, to change how often it "
        "shows a behaviour. They change no weights.\n",
        _vectors(named),
        _use(named, repo_id),
        _evaluation(named, report),
        _origin(named),
        f"## Licence\n\n{licence or 'Not stated: ask the author before using them.'}\n",
    ]
    return "\n".join(part for part in parts if part)


def _header(named: Mapping[str, Direction], licence: str, tags: Sequence[str]) -> str:
    from huggingface_hub import ModelCardData

    models = sorted({d.model_id for d in named.values() if re.fullmatch(r"[\w.-]+/[\w.-]+", d.model_id)})
    known = licence.lower() in _LICENCES
    fields: dict[str, Any] = {"tags": [*tags, *sorted({_tag(d.behaviour) for d in named.values() if d.behaviour})]}
    if models:
        fields |= {"base_model": models if len(models) > 1 else models[0], "base_model_relation": "adapter"}
    if licence:
        fields |= {"license": licence.lower()} if known else {"license": "other", "license_name": _tag(licence)}
    return str(ModelCardData(library_name="steerable", **fields).to_yaml())


def _tag(name: str) -> str:
    return re.sub(r"[^a-z0-9.-]+", "-", name.lower()).strip("-")[:60] or "other"


def _vectors(named: Mapping[str, Direction]) -> str:
    lines = [
        "## Vectors",
        "",
        "| file | behaviour | model | where | width | strength | tokens | norm of the vector / of the activations |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, d in named.items():
        kinds = dict.fromkeys(s.kind for s in d.vectors)
        where = "; ".join(f"{kind} {layers_text(s.layer for s in d.vectors if s.kind == kind)}" for kind in kinds)
        model = d.model_id + (f" at {d.model_revision[:12]}" if d.model_revision else "")
        cells = (
            f"`{name}.safetensors`", d.behaviour, model, where, str(next(iter(d.vectors.values())).shape[-1]),
            f"{d.strength:g}", f"`{d.gate}`", _norms(d),
        )  # fmt: skip
        lines.append("| " + " | ".join(_cell(c) for c in cells) + " |")
    lines += ["", "Layers are 0-based blocks; `resid_post` is the output of a block."]
    return "\n".join(lines) + "\n"


def _norms(d: Direction) -> str:
    ours = _range([float(v.double().norm()) for v in d.vectors.values()])
    return f"{ours} / {_range([d.norms[s] for s in d.vectors if s in d.norms])}"


def _range(numbers: Sequence[float]) -> str:
    if not numbers:
        return "not stated"
    low, high = f"{min(numbers):.3g}", f"{max(numbers):.3g}"
    return low if low == high else f"{low} to {high}"


def _use(named: Mapping[str, Direction], repo_id: str) -> str:
    name, direction = next(iter(named.items()))
    where = repr(repo_id or "folder/or/owner/name").replace("'", '"')
    which = f', filename="{name}"' if len(named) > 1 else ""
    model = json.dumps(one_line(direction.model_id or "the/model"))
    return f"""## How to use

```python
import steerable as st

direction = st.Direction.from_pretrained({where}{which})
model, tokenizer = st.load({model})
prompt = tokenizer.apply_chat_template(
    [{{"role": "user", "content": "How many primes are below 30?"}}],
    add_generation_prompt=True, return_tensors="pt", return_dict=True,
).to(model.device)
with st.steer(model, direction, strength={direction.strength:g}, tokenizer=tokenizer):
    print(tokenizer.decode(model.generate(**prompt, max_new_tokens=500)[0]))
```
"""


def _evaluation(named: Mapping[str, Direction], report: Mapping[str, Any]) -> str:
    cells = report.get("cells")
    if not isinstance(cells, list) or not cells:
        return "## Evaluation\n\nNone was given. Nothing is known of what these vectors do and of their side effects.\n"
    tables = [table for d in named.values() if (table := _table(d, [c for c in cells if isinstance(c, dict)]))]
    if not tables:
        return "## Evaluation\n\nThe run that was given did not steer with these vectors.\n"
    source = report.get("config", {}) if isinstance(report.get("config"), Mapping) else {}
    about = f"on `{source['model']}`" if source.get("model") else "on the run's model"
    return (
        f"## Evaluation\n\nMeasured {about}{_same_files(named, report)}. Means with 95 % intervals, chains as tasks x "
        "samples; `random`: a random direction of equal norm, `shuffled`: a vector from shuffled labels. A change "
        "counts only where the vector's interval lies beyond those of its controls.\n\n" + "\n".join(tables)
    )


def _same_files(named: Mapping[str, Direction], report: Mapping[str, Any]) -> str:
    """Whether the run steered with these very files, by the hashes in its report."""
    hashes = report.get("hashes")
    known = set(hashes.values()) if isinstance(hashes, Mapping) else set()
    if all(hashlib.sha256(d.to_bytes()).hexdigest() in known for d in named.values()):
        return " with these very files, on tasks that they were not made from"
    return " (the report does not show whether with these very files)"


def _table(d: Direction, cells: list[Cell]) -> str:
    """One table a setting in which the behaviour's vector was tried at this direction's layers."""
    settings = list(
        dict.fromkeys(
            setting_of(c)
            for c in cells
            if c.get("behaviour") == d.behaviour and c.get("strength") and set(c.get("layers") or ()) <= set(d.layers)
        )
    )
    tables = []
    for setting in settings:
        lines = [
            f"**{one_line(d.behaviour)}**, layers {layers_text(setting.layers)}, tokens `{setting.where}`",
            "",
            f"| vector | strength | chains | share of {_cell(d.behaviour)} | "
            + " | ".join(title for _, title in _METRICS)
            + " |",
            "|---|---|---|---|" + "---|" * len(_METRICS),
        ]
        if zero := unsteered(cells, d.behaviour):
            lines.append(_row("none", 0.0, zero, d.behaviour))
        for control in (None, "random", "shuffled"):
            for strength, found in doses(cells, d.behaviour, control, setting).items():
                if strength:
                    lines.append(_row(control or "this one", strength, found, d.behaviour))
        tables.append("\n".join(lines) + "\n")
    return "\n".join(tables)


def _row(what: str, strength: float, cells: list[Cell], behaviour: str) -> str:
    values = [measured(cells, f"fractions.{behaviour}"), *(measured(cells, metric) for metric, _ in _METRICS)]
    chains = " + ".join(" x ".join(_count(c.get(key)) for key in ("tasks", "samples")) for c in cells)
    return f"| {what} | {strength:+g} | {chains} | " + " | ".join(_interval(v) for v in values) + " |"


def _count(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else "?"


def _interval(value: Interval | None) -> str:
    if value is None:
        return "not measured"
    return f"{value.mean:.3g} ({value.low:.3g} to {value.high:.3g})"


def _origin(named: Mapping[str, Direction]) -> str:
    lines = ["## How they were made", ""]
    for name, d in named.items():
        facts = [
            ("method", d.method), ("made by", d.created_by), ("SHA-256 of the data", d.data_sha256),
            *((key, d.stats[key]) for key in ("window", "baseline", "spans", "chains") if key in d.stats),
        ]  # fmt: skip
        said = "; ".join(f"{key}: {_cell(str(value))}" for key, value in facts if value not in ("", None))
        lines.append(f"- `{name}`: {said or 'not stated'}")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return one_line(text.replace("|", "\\|"))
