"""Every map at every gate on the bundled model, a small Llama and a pretrained one, in 32 and in 16 bits.

All compositions are rows of one batch, so that a model is run a few times only. In 16 bits the pretrained one has each
map and each gate once.
"""

import copy
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

import steerable as st
from steerable.engines.hf.hooks import Handle
from steerable.models import loading as models
from steerable.models.taps import tap
from steerable.steering.gates import probe, selectors, when
from steerable.steering.maps import MAPS, Affine, Clip, NormShift, Rotate, Shift, Swap, fitted
from steerable.steering.site import Site
from steerable.steering.spec import Intervention, Steering
from steerable.store.errors import SteerableWarning

PROMPT, LENGTH, KEPT = 4, 9, 3  # tokens of the prompt, of the text, and those at whose end logits are compared
PHI = {
    "shift": Shift((1.0, -0.5)),
    "norm shift": NormShift((0.3, -0.2)),
    "ablate": Clip.ablate(),
    "set": Clip.set_to((1.5, -0.5)),
    "floor": Clip.floor(0.1),
    "ceiling": Clip.ceiling((0.2, -0.3)),
    "rotate": Rotate(30),
    "rotate_to": Rotate(200, absolute=True),
    "affine": Affine((0.5, 2.0), 0.3),
    "matrix": Affine(((0.5, 1.0), (-1.0, 0.25)), (0.1, 0.2)),
    "swap": Swap((0.7, -0.2)),
    "swap by position": Swap(((1.0, 2.0), (0.5, -0.5), (-1.0, 0.3), (0.2, 0.2))),
}


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass
class Subject:
    """A model, a text, compositions that act on it, each with the tokens that its gate means, and the plain run."""

    model: Any
    tokenizer: Any
    ids: torch.Tensor
    site: Site
    names: list[tuple[str, str]]
    programs: list[Steering]
    masks: torch.Tensor
    plain: dict[Site, torch.Tensor]
    logits: torch.Tensor

    @property
    def rows(self) -> torch.Tensor:
        return self.ids.expand(len(self.programs), -1)

    @contextmanager
    def steered(self, programs, index):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SteerableWarning)
            with Handle(self.model, programs, self.tokenizer, track=False) as handle:
                handle.assign(torch.arange(len(programs)) if index is None else index)
                handle.prompt_lengths([PROMPT] * (len(programs) if index is None else len(index)))
                yield

    def read(self, sites):
        """A dictionary that holds activations at the sites of the runs inside."""
        seen: dict[Site, torch.Tensor] = {}
        return seen, tap(self.model, {site: lambda h, site=site: seen.__setitem__(site, h) for site in sites})


def run(model, ids, **options):
    with torch.no_grad():
        return model(ids, logits_to_keep=KEPT, **options)


def parting(values):
    """A threshold as far from all values as can be, with values on both sides of it."""
    ordered = values.sort().values
    gap = int(ordered.diff().argmax())
    return float(ordered[gap : gap + 2].mean())


def gates_of(ids, tokenizer, site, before, h, read):
    """Gates, and the tokens that each means by its definition. h, read: activations at both sites, [T, d] float64."""
    t = torch.arange(LENGTH)
    v, w = draw(h.shape[-1], seed=5).double(), draw(h.shape[-1], seed=6).double() / h.shape[-1]
    along, score = read @ v / (v @ v), h @ w
    middle, half = parting(along), parting(score)
    low = float(along[PROMPT - 1] - along.abs().max())
    gates = {
        "all": (selectors.all, t >= 0),
        "prompt": (selectors.prompt, t < PROMPT),
        "last_prompt": (selectors.last_prompt, t == PROMPT - 1),
        "generated": (selectors.generated, t >= PROMPT),
        "positions": (selectors.positions(1, 6), (t >= 1) & (t < 6)),
        "tokens": (selectors.tokens(int(ids[5])) | selectors.prompt, (ids == ids[5]) | (t < PROMPT)),
        "when": (when({before: v.float()}, ">", middle), along > middle),
        "probe": (probe({site: w.float()}, "<=", 0.5, bias=-half) & ~selectors.prompt, (score <= half) & (t >= PROMPT)),
        "latched": (selectors.latched(when({before: v.float()}, ">", low)), t >= PROMPT - 1),
        "shut": (selectors.latched(when({before: v.float()}, "<", low)), t < 0),
    }
    if tokenizer is not None:
        opening, closing = (int((ids == tag).nonzero()) for tag in st.think_tags(tokenizer).single)
        gates["thinking"] = (selectors.thinking, (t > opening) & (t < closing))
        gates["answer"] = (selectors.answer, t > closing)
    return gates


MODELS = ["pocket", "stories", pytest.param("smol", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request):
    return request.param


@pytest.fixture(scope="module", params=MODELS)
def subject(request, dtype):
    tokenizer = None
    if request.param == "pocket":
        model, tokenizer = st.load("pocket", device="cpu")
    else:
        model = request.getfixturevalue(request.param)
        model = model if request.param == "stories" else model[0]
    model = model if model.dtype == dtype else copy.deepcopy(model).to(dtype)
    ids = torch.randint(10, 400, (LENGTH,), generator=torch.Generator().manual_seed(0))
    if tokenizer is not None:
        ids[2], ids[6] = (int(tag) for tag in st.think_tags(tokenizer).single)
    site, before = Site("resid_post", models.n_layers(model) // 2), Site("mlp_out", 0)
    seen = {}
    with tap(model, {s: lambda h, s=s: seen.__setitem__(s, h[0].double()) for s in (site, before)}):
        run(model, ids[None])
    rows = draw(2, seen[site].shape[-1], seed=1)
    rows *= 0.3 * seen[site].norm(dim=-1).median().float() / rows.norm(dim=-1, keepdim=True)  # neither orthogonal
    gates = gates_of(ids, tokenizer, site, before, seen[site], seen[before])
    names = [(phi, gate) for phi in PHI for gate in gates]
    if request.param == "smol" and dtype == torch.bfloat16:  # which takes minutes without the processor's help
        names = [(phi, list(gates)[i % len(gates)]) for i, phi in enumerate(PHI)]
    programs = []
    for number, (phi, gate) in enumerate(names):
        basis, map = fitted(rows * torch.tensor([[1.0], [1.5]]), PHI[phi])
        is_rescaled = (number + number // len(gates)) % 2 == 0
        programs.append((Intervention(site, basis, map, gates[gate][0], strength=0.8, rescale=is_rescaled),))
    masks = torch.stack([gates[gate][1] for _, gate in names])
    made = Subject(model, tokenizer, ids, site, names, programs, masks, {}, torch.empty(0))
    made.plain, reading = made.read([site, Site("resid_post", site.layer - 1)])
    with reading:
        made.logits = run(model, made.rows).logits
    return made


def test_all_maps_are_there():
    here = {MAPS.name_of(type(map)) for map in PHI.values()}
    assert {"shift", "norm_shift", "clip", "rotate", "affine", "swap"} <= here


def test_nothing_is_changed_at_strength_zero_where_a_gate_is_shut_and_after(subject):
    """Bit for bit, beside rows of the same batch that are steered."""
    shut = torch.tensor([gate == "shut" for _, gate in subject.names])
    zero = torch.arange(len(shut)) % 2 == 0
    programs = [
        tuple(replace(i, strength=0.0) for i in program) if none else program
        for program, none in zip(subject.programs, zero, strict=True)
    ]
    with pytest.raises(ZeroDivisionError), subject.steered(programs, None):
        logits = run(subject.model, subject.rows).logits
        _ = 1 / 0
    same = (logits == subject.logits).flatten(1).all(1)
    assert bool(same[zero | shut].all())
    assert not bool(same[~zero & ~shut].all())
    assert torch.equal(run(subject.model, subject.rows).logits, subject.logits)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in subject.model.modules())


def test_the_formula_where_the_gate_is_open_and_not_one_bit_elsewhere(subject, dtype):
    """In float32, with one rounding at the end; nothing changes before the site."""
    seen, reading = subject.read(subject.plain)
    with subject.steered(subject.programs, None), reading:
        run(subject.model, subject.rows)
    h, new = subject.plain[subject.site], seen[subject.site]
    earlier = Site("resid_post", subject.site.layer - 1)
    assert torch.equal(seen[earlier], subject.plain[earlier]) and new.dtype == dtype
    assert torch.equal(new[~subject.masks], h[~subject.masks])
    for row, ((one,), name) in enumerate(zip(subject.programs, subject.names, strict=True)):
        if not bool(subject.masks[row].any()):
            continue
        here = subject.masks[row]
        wide = h[row : row + 1].float()
        expected = one.apply(wide)[0, here]
        size = float(wide[0, here].norm(dim=-1).max())
        rounding = (
            {"rtol": 1e-5, "atol": 1e-6 * size} if dtype == torch.float32 else {"rtol": 1 / 128, "atol": 1e-6 * size}
        )
        close = torch.isclose(new[row, here].float(), expected.to(dtype).float(), **rounding)
        assert bool(close.all()), name
        if one.rescale and dtype == torch.float32:
            torch.testing.assert_close(new[row, here].norm(dim=-1), wide[0, here].norm(dim=-1), rtol=1e-5, atol=0)


def in_pieces(subject, programs):
    """Logits with a cache: the prompt, then a token at a time."""
    rows = subject.rows if programs else subject.rows[:1]
    parts, cache, start = [], None, 0
    with subject.steered(programs or [()], None):
        for length in [PROMPT] + [1] * (LENGTH - PROMPT):
            out = run(subject.model, rows[:, start : start + length], past_key_values=cache, use_cache=True)
            cache, start = out.past_key_values, start + length
            parts.append(out.logits[:, -1:])
    return torch.cat(parts[-KEPT:], 1)


def padded(subject, programs, width=3):
    """Logits behind padding."""
    rows = subject.rows if programs else subject.rows[:1]
    ids = torch.cat([torch.zeros(len(rows), width, dtype=torch.long), rows], 1)
    mask = torch.ones_like(ids)
    mask[:, :width] = 0
    places = (mask.cumsum(1) - 1).clamp_min(0)
    with subject.steered(programs or [()], None):
        return run(subject.model, ids, attention_mask=mask, position_ids=places).logits


@pytest.mark.parametrize("way", [in_pieces, padded])
def test_a_cache_and_padding_change_nothing_but_rounding(subject, dtype, way):
    """Where the unsteered model's own logits change by rounding, the steered ones do not change by much more."""
    with subject.steered(subject.programs, None):
        whole = run(subject.model, subject.rows).logits.float().log_softmax(-1)
    other = way(subject, subject.programs).float().log_softmax(-1)
    plain = subject.logits[:1].float().log_softmax(-1) - way(subject, []).float().log_softmax(-1)
    apart = (whole - other).abs().mean((1, 2))
    effect = (whole - subject.logits.float().log_softmax(-1)).abs().mean((1, 2))
    limit = 1e-4 if dtype == torch.float32 else 5 * float(plain.abs().mean()) + 0.02
    worst = int(apart.argmax())
    assert float(apart[worst]) < limit, (subject.names[worst], apart[worst], limit)
    assert float(effect.max()) > 5 * limit  # which a wrong token would show


def test_alone_as_in_a_batch(subject, dtype):
    with subject.steered(subject.programs, None):
        whole = run(subject.model, subject.rows).logits.float().log_softmax(-1)
    for row in range(len(subject.programs) // 2, len(subject.programs), 13):
        with subject.steered([subject.programs[row]], None):
            alone = run(subject.model, subject.ids[None]).logits.float().log_softmax(-1)
        apart = float((whole[row] - alone[0]).abs().mean())
        assert apart < (1e-4 if dtype == torch.float32 else 0.1), (subject.names[row], apart)
