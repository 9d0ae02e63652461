"""Slots and strengths of the tokens of a step, however texts are cut into steps, against the gates themselves."""

import random

import numpy as np
import pytest
import torch

import steerable as st
from steerable.engines.vllm.banks import KINDS, Bank, Tokens
from steerable.engines.vllm.lowering import lower, slot_of, to_wire
from steerable.engines.vllm.settings import Settings
from steerable.engines.vllm.slots import Slots
from steerable.engines.vllm.steps import Arrival, Steps
from steerable.steering.gates import resolve
from steerable.steering.schedule import CLOSING
from steerable.steering.think import think_tags
from steerable.steering.tokens import SequenceState
from steerable.store.errors import UsageError

D, ROOM, DRAFTS = 8, 40, 3
SETTINGS = Settings(lanes=2, maps=2, gates=2)
GATES = (
    "all", "prompt", "generated", "last_prompt", "thinking", "answer", "boundary", "thinking & ~boundary",
    "positions(3, 9)", "tokens(7, 8, 9)", "answer | prompt",
)  # fmt: skip
SCHEDULES = ("constant", "ramp(0, 1, 6)", "until(4)", "until(close)", "until([8, 9])")


def steps_of(tokenizer, slots=50):
    tokens = Tokens(SETTINGS, 256, torch.device("cpu"), 8)
    bank = Bank(SETTINGS, dict.fromkeys(KINDS, slots), D, tokens)
    return Steps(SETTINGS, tokens, {kind: Slots({0: bank}, kind, slots) for kind in KINDS}, lambda: tokenizer)


def direction(seed):
    return st.Direction({st.Site("resid_post", 0): torch.randn(D, generator=torch.Generator().manual_seed(seed))})


WHEN, HELD = st.selectors.when(direction(20), ">", 0.1), st.selectors.when(direction(21), "<", 0.1)
CONDITIONS = (
    WHEN, ~WHEN & st.parse_selector("thinking"), WHEN | st.parse_selector("boundary"), st.selectors.latched(HELD),
    ~st.selectors.latched(~HELD & st.parse_selector("thinking | tokens(7)")) & WHEN,
)  # fmt: skip


def factors(intervention, ids, prompt, tokenizer, opened):
    """The factor of the strength at each of the ids, from the gate and the schedule of the intervention. opened:
    whether each of the gate's conditions is open, at all tokens."""
    gate, schedule = resolve(intervention.gate, tokenizer), intervention.schedule
    events = (schedule.event,) if schedule.event else ()
    state = SequenceState(think_tags(tokenizer), gate.breaks, events, gate.latches)
    state.start(1, prompt_lengths=torch.tensor([prompt]))
    tokens = state.advance(torch.tensor([ids]))
    over = schedule.over(tokens)[0] if schedule.needs_tokens else 1.0
    return gate(tokens, lambda leaf: torch.tensor([[opened[leaf]]]))[0].float() * over


class Served:
    """A request whose text is known beforehand; `fed` tokens are computed, and `drawn` are known to the scheduler."""

    def __init__(self, name, steering, text, prompt):
        self.name, self.steering, self.text, self.prompt = name, steering, text, prompt
        self.fed, self.drawn = 0, prompt

    def arrival(self):
        extra = {"steering": to_wire(lower(self.steering, SETTINGS), None)} if self.steering else None
        return Arrival(extra, self.text[: self.drawn], self.prompt, ROOM + DRAFTS)


def random_step(rng, requests, tokenizer):
    """Which requests feed how many tokens, with wrong drafts behind the known ones."""
    chosen = []
    for request in rng.sample(requests, rng.randint(1, len(requests))):
        if request.fed == len(request.text):
            continue
        ids = request.text[request.fed : request.drawn]
        if request.fed < request.drawn - 1:  # a prompt, or what is computed again
            ids = ids[: rng.randint(1, len(ids))]
        elif rng.random() < 0.5:
            right = request.text[request.drawn : request.drawn + rng.randint(0, DRAFTS)]
            wrong = [rng.randrange(len(tokenizer)) for _ in range(rng.randint(0, DRAFTS - len(right)))]
            ids = [*ids, *right, *wrong]
            chosen.append((request, ids, len(right)))
            continue
        chosen.append((request, ids, 0))
    return chosen


@pytest.mark.parametrize("seed", range(6))
def test_every_token_has_the_strength_of_its_gate(tokenizer, seed):
    rng = random.Random(seed)
    marks = [i for tag in (think_tags(tokenizer).open, think_tags(tokenizer).close) for i in tag]
    alphabet = [*range(len(tokenizer)), *marks * 8, 7, 8, 9, 7, 8, 9]
    requests, waiting = [], []
    for n in range(24):
        text = [rng.choice(alphabet) for _ in range(rng.randint(6, ROOM))]
        parts = [
            direction(rng.randrange(5)).steering(
                rng.choice((0.5, -1.0)), where=rng.choice((*GATES, *CONDITIONS)), schedule=rng.choice(SCHEDULES),
                map=rng.choice((None, None, "ablate")),
            )
            for _ in range(rng.choice((0, 1, 1, 1)))
        ]  # fmt: skip
        if parts and rng.random() < 0.4:
            parts.append(direction(7).steering(0.25, where=rng.choice((*GATES, *CONDITIONS))))
        waiting.append(Served(str(n), sum(parts[1:], parts[0]) if parts else (), text, rng.randint(1, 5)))
    steps = steps_of(tokenizer)
    touched = 0
    while waiting or requests:
        while waiting and len(requests) < 8:
            requests.append(waiting.pop())
        for request in requests:
            if rng.random() < 0.03:  # preempted: computed again, with its text as it is
                steps.forget([request.name])
                request.fed = 0
        chosen = random_step(rng, requests, tokenizer)
        if not chosen:
            continue
        arrivals = {request.name: request.arrival() for request, _, _ in chosen}
        ids = torch.tensor([i for _, ids, _ in chosen for i in ids])
        positions = torch.tensor([request.fed + n for request, ids, _ in chosen for n in range(len(ids))])
        counts = np.array([len(ids) for _, ids, _ in chosen], np.int32)
        starts = np.array([request.fed for request, _, _ in chosen], np.int32)
        steps.keep({request.name: request for request in requests})
        steps.prepare([request.name for request, _, _ in chosen], starts, counts, ids, positions, arrivals.__getitem__)
        offset = 0
        for request, fed, right in chosen:
            touched += check(steps, request, fed, offset, tokenizer)
            offset += len(fed)
            if request.fed + len(fed) >= request.drawn:  # one token is drawn behind those that were right
                request.fed = min(request.drawn + right, len(request.text))
                request.drawn = min(request.fed + 1, len(request.text))
            else:
                request.fed += len(fed)
        assert not steps.tokens.strength[:, offset:].any()
        requests = [request for request in requests if request.fed < len(request.text)]
    assert touched > 50


def check(steps, request, fed, offset, tokenizer):
    """The strengths, slots and answers of one request's tokens; how many strengths are not zero."""
    lanes, [bank] = lower(request.steering, SETTINGS), steps.banks.values()
    here = slice(offset, offset + len(fed))
    strength = steps.tokens.strength.view(4, SETTINGS.answers, -1)[:, :, here]
    text = [*request.text[: request.fed], *fed]
    for lane in lanes:
        first = next(i for i in request.steering if i.strength == lane.strength)
        for answer in range(SETTINGS.answers):
            opened = {
                leaf: any(answer >> row.number & 1 for row in lane.rows if row.is_latched == (leaf == HELD))
                for leaf in (WHEN, HELD)
            }
            expected = lane.strength * factors(first, text, request.prompt, tokenizer, opened)[request.fed :]
            assert torch.allclose(strength[lane.number, answer], expected), (request.name, str(first.gate))
        [slot] = set(steps.tokens.slot[lane.number, here].tolist())
        rows = bank.bases if lane.number >= SETTINGS.lanes else bank.vectors
        assert torch.equal(rows[slot], slot_of(lane.content)[0][0])
        for row in lane.rows:
            [slot] = set(steps.tokens.slot[4 + row.number, here].tolist())
            assert torch.equal(bank.weights[slot], slot_of(row.content)[0][1])
            # the graph's part, with answers that hang on request, row and position
            answers = torch.tensor([hash((request.name, row.number, at)) % 2 > 0 for at in range(len(text))])
            step = torch.zeros(steps.tokens.slot.shape[1], dtype=torch.bool)
            step[here] = answers[request.fed :]
            chosen = torch.cat([bank.held[row.number], step])[steps.tokens.source[row.number, here]]
            if row.is_latched and len(text) > request.prompt:
                answers[request.prompt :] = answers[request.prompt - 1].item()
            assert torch.equal(chosen, answers[request.fed :])
            bank.opened[row.number, here] = chosen
    others = sorted({0, 1, 2, 3} - {lane.number for lane in lanes})
    assert not strength[others].any()
    return int((strength != 0).sum())


def test_a_request_that_was_not_admitted_is_refused(tokenizer):
    steps, one = steps_of(tokenizer), np.array([1], np.int32)
    raw = Arrival({"steering": "0.5 happy"}, [5], 1, 4)
    with pytest.raises(UsageError, match="without having passed"):
        steps.prepare(["a"], one - 1, one, torch.tensor([5]), torch.tensor([0]), lambda name: raw)


def test_lines_are_used_again(tokenizer):
    """Many requests take no more memory than those of a moment."""
    steps, one = steps_of(tokenizer), np.array([1], np.int32)
    steering = direction(0).steering(0.5, where="thinking", schedule=f"until({CLOSING})")
    arrival = Served("a", steering, [5] * 9, 2).arrival()
    for n in range(100):
        steps.keep({})
        steps.prepare([str(n)], one, one, torch.tensor([5]), torch.tensor([1]), lambda name: arrival)
    [tracker] = steps._trackers.values()
    assert tracker._table.shape[:2] == (8, 64)
