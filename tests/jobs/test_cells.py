"""The cells as data: which cells there are, and what each is made of."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from steerable.chains.records import STEERABLE
from steerable.jobs import cells as jobs_cells
from steerable.jobs.settings import Config
from steerable.steering.direction import Direction
from steerable.steering.site import Site

SELECTION = {
    b: {"layer": 2 if k < 3 else 4, "layers": [1, 2, 3, 4], "window": "onset", "baseline": "pooled"}
    for k, b in enumerate(STEERABLE)
}
CONFIG = Config(samples=4, side_samples=2, sweep="0.5", controls=5)


def load(path):
    """A direction of every layer, another for each path; its norm is 2, that of the activations 8."""
    seed = torch.Generator().manual_seed(sum(map(ord, path)))
    vectors = {Site("resid_post", n): torch.randn(1, 6, generator=seed) for n in range(6)}
    norms = dict.fromkeys(vectors, 8.0)
    return Direction({site: 2 * v / v.norm() for site, v in vectors.items()}, model_id=path, norms=norms)


@pytest.fixture(scope="module")
def cells():
    return {cell.name: cell for cell in jobs_cells.evaluation_cells(CONFIG, SELECTION, load)}


def test_names_are_file_names_and_differ(cells):
    assert len(cells) == len(jobs_cells.evaluation_cells(CONFIG, SELECTION, load))
    assert not any("/" in name or " " in name for name in cells)


def test_every_behaviour_has_its_cells(cells):
    for b in STEERABLE:
        for sign in ("+1", "-1"):
            assert {f"{b}.{sign}{kind}" for kind in ("", ".layers", ".thinking")} <= cells.keys()
        assert f"{b}.+0.5" in cells and f"{b}.1.shuffled" in cells


def test_a_behaviour_up(cells):
    cell = cells["backtracking.+1"]
    assert (cell.strength, cell.layers, cell.where, cell.control) == (1.0, (4,), "all", None)
    (part,) = cell.parts
    direction = load("vectors/candidates/onset.pooled/backtracking.safetensors")
    assert part.samples == (0, 1, 2, 3)
    assert part.steering == direction.only([4]).steering(1.0)
    assert part.dose == {4: pytest.approx(2 / 8)}


def test_several_layers_share_the_strength(cells):
    (part,) = cells["backtracking.-1.layers"].parts
    assert [i.site.layer for i in part.steering] == [1, 2, 3, 4] and {i.strength for i in part.steering} == {-0.25}
    assert cells["backtracking.-1.layers"].strength == -1.0
    assert part.samples == (0, 1)
    assert part.dose == dict.fromkeys((1, 2, 3, 4), pytest.approx(2 / 8 / 4))


def test_side_cells_have_fewer_tasks(cells):
    for name, cell in cells.items():
        is_side = name.endswith((".layers", ".thinking", "0.5"))
        assert cell.tasks == (CONFIG.side_tasks if is_side else None), name


def test_thinking_only(cells):
    (part,) = cells["backtracking.+1.thinking"].parts
    assert str(part.steering[0].gate) == cells["backtracking.+1.thinking"].where == "thinking"


def test_no_setting_is_generated_twice():
    rows = jobs_cells.evaluation_cells(CONFIG.replace(gate="thinking"), SELECTION, load)
    places = [(row.behaviours, row.control, row.strength, row.layers, row.where) for row in rows]
    assert len(set(places)) == len(places)


def test_a_dose_is_given_to_the_vector_and_its_controls():
    selection = {b: chosen | {"dose": 0.5} for b, chosen in SELECTION.items()}
    for cell in jobs_cells.evaluation_cells(CONFIG, selection, load):
        for part in cell.parts if cell.strength and cell.control != "random" else ():
            share = abs(cell.strength) / len(cell.layers)
            assert part.dose == dict.fromkeys(cell.layers, pytest.approx(0.5 * share))


def test_what_is_not_added_has_no_dose():
    ablating = jobs_cells.evaluation_cells(CONFIG, SELECTION, lambda path: replace(load(path), map="ablate"))
    assert not any(part.dose for cell in ablating for part in cell.parts)


@pytest.mark.parametrize("name", ["backtracking.1.random", "backtracking.1.shuffled"])
@pytest.mark.parametrize("tasks", [50, 7])
def test_a_control_for_both_signs(cells, name, tasks):
    cell = cells[name]
    assert cell.both_signs and cell.strength == 1.0
    met = [
        (task, i.basis.numpy().tobytes(), i.strength)
        for part in cell.parts
        for task in range(tasks)[part.tasks]
        for i in part.steering
    ]
    directions = {vector for _, vector, _ in met}
    assert len(directions) == CONFIG.controls
    # every task meets every direction once, and no direction always with one sign
    assert Counter((task, v) for task, v, _ in met) == {(t, v): 1 for t in range(tasks) for v in directions}
    for vector in directions:
        signs = Counter(strength for _, v, strength in met if v == vector)
        assert set(signs) == {1.0, -1.0} and abs(signs[1.0] - signs[-1.0]) <= 1
    assert [part.direction for part in cell.parts] == [k // 2 for k in range(2 * CONFIG.controls)]
    # The unsteered cell has the same samples, so that the control is compared in pairs.
    assert {s for part in cell.parts for s in part.samples} == {0, 1, 2, 3}


@pytest.mark.parametrize("baseline", ["pooled", "overall"])
def test_the_divergence_of_every_cell_is_of_the_same_tasks(baseline):
    """A control's parts take turns: as many tasks as the vector's own cell has, and every direction with every sign."""
    tasks = [{"id": f"task {i}"} for i in range(50)]
    config = Config(samples=4, controls=4)
    selection = {b: chosen | {"baseline": baseline} for b, chosen in SELECTION.items()}
    for cell in jobs_cells.evaluation_cells(config, selection, load):
        chains = [
            {"part": k, "task_id": task["id"], "sample": sample}
            for k, part in enumerate(cell.parts)
            for task in tasks[: cell.tasks][part.tasks]
            for sample in part.samples
        ]
        compared, steerings = jobs_cells.compared_chains(cell, chains, tasks, 8)
        assert [chain["task_id"] for chain in compared] == [task["id"] for task in tasks[:8]], cell.name
        assert steerings == [cell.parts[chain["part"]].steering for chain in compared]
        if cell.control:
            met = Counter((i.basis.numpy().tobytes(), i.strength) for steering in steerings for i in steering)
            assert len(met) == (8 if cell.both_signs else 4) and len(set(met.values())) == 1


def test_beside_the_overall_mean_shuffled_vectors_have_a_sign():
    selection = {b: chosen | {"baseline": "overall"} for b, chosen in SELECTION.items()}
    cells = {cell.name: cell for cell in jobs_cells.evaluation_cells(CONFIG, selection, load)}
    for sign in (-1.0, 1.0):
        cell = cells[f"backtracking.{sign:+g}.shuffled"]
        assert not cell.both_signs and [part.tasks for part in cell.parts] == [slice(0, None, 1)] * CONFIG.controls
        assert {i.strength for part in cell.parts for i in part.steering} == {sign}


def test_unsteered_is_there_once(cells):
    unsteered = [cell for cell in cells.values() if cell.strength == 0]
    assert [cell.name for cell in unsteered] == ["unsteered"]
    assert unsteered[0].behaviours == STEERABLE
    assert unsteered[0].parts == (jobs_cells.Part((0, 1, 2, 3)),)


def test_greedy_needs_one_sample():
    greedy = Config(samples=4, greedy=True)
    cells = [*jobs_cells.evaluation_cells(greedy, SELECTION, load), *jobs_cells.validation_cells(candidates(), load)]
    assert {part.samples for cell in cells for part in cell.parts} == {(0,)}


def candidates():
    return {
        b: [
            {"window": w, "baseline": "overall", "layer": layer, "dose": None}
            for w in ("span", "onset")
            for layer in (1, 2)
        ]
        for b in STEERABLE
    }


def test_validation_tries_every_candidate_both_ways():
    cells = jobs_cells.validation_cells(candidates(), load)
    names = [cell.name for cell in cells]
    assert len(names) == len(set(names)) == 4 * 4 * 2
    assert names[0] == f"{STEERABLE[0]}.span.layer1.-1"
    direction = load("vectors/candidates/span.overall/adding-knowledge.safetensors")
    assert cells[0].parts[0].steering == direction.only([1]).steering(-1.0)
