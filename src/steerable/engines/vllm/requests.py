"""The door: a request's steering is read, checked and lowered before the request reaches the engine.

`SamplingParams.extra_args["steering"]` (over HTTP `vllm_xargs`, as a JSON string) is one of

- a steering: interventions, as `direction.steering(0.5)` gives them, or their JSON (`spec.to_json`);
- its text, "0.5 happy@thinking - 0.2 verbose", whose names are directions of the engine's folder;
- an object or a list of objects {"direction": name, or "vectors": {"3": [...]}, and "strength", "layers", "where",
  "map", "schedule", "rescale", all of which may be left out}.

`extra_args["steering_prompt_tokens"]` says how many of the tokens count as prompt, where text that was generated before
is fed as a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steerable.engines.vllm.folder import EMPTY, Folder
from steerable.engines.vllm.kept import Kept
from steerable.engines.vllm.layers import listed
from steerable.engines.vllm.lowering import Lane, identity, lower, to_wire
from steerable.engines.vllm.prefixes import hangs_on_prompt, is_keyed_by_block, may_look_ahead
from steerable.engines.vllm.settings import KEY, Settings, settings_of
from steerable.models.loading import may_be_same, short_name
from steerable.steering.direction import Direction
from steerable.steering.gates import resolve
from steerable.steering.plain import is_index
from steerable.steering.site import Site
from steerable.steering.spec import Intervention, Program, Steering, drawn, from_json, steering_of
from steerable.steering.text import parse_steering
from steerable.steering.think import think_tags
from steerable.store.errors import SteerableError, UsageError
from steerable.store.files import strict_json

PROMPT_TOKENS = "steering_prompt_tokens"
LONGEST, MOST, NUMBERS = 10_000, 100, 10_000_000
"""Characters of a steering as text, parts of one as JSON, and numbers of its bases: beyond them, reading it would keep
others waiting."""
PEERS = ("hotwire", "apply_steering_vectors")
"""What requests to other plugins that steer (hotwire, vllm-lens) say in `vllm_xargs`, where vLLM passes over it."""
IN_BODY = f'a steering is "vllm_xargs": {{"{KEY}": "0.5 happy"}}'
_SALT = "steering:"
_ENTRY = {"direction", "vectors", "strength", "layers", "where", "map", "schedule", "rescale"}


def admit(processor: Any, request: Any) -> Any:
    """An `EngineCoreRequest` whose steering is resolved. Raises vLLM's validation error, which a server answers with
    400, for a steering that cannot be done."""
    params, salt = request.sampling_params, request.cache_salt
    extra = getattr(params, "extra_args", None) or {}
    if KEY not in extra and PROMPT_TOKENS not in extra and not (salt or "").startswith(_SALT):
        return request
    from vllm.exceptions import VLLMValidationError

    try:
        prompt = extra.get(PROMPT_TOKENS)
        length = len(request.prompt_token_ids or ())
        if prompt is not None and not (is_index(prompt, 1) and prompt <= length):
            raise UsageError(
                f"{PROMPT_TOKENS} is a number of tokens from 1 to the {length} of the text, not {prompt!r}"
            )
        lanes = _lanes(processor, extra[KEY], _seed(params, request)) if KEY in extra else ()
        if lanes and request.prompt_token_ids is None:
            raise UsageError("a steered request needs token ids, not embeddings, as its prompt")
        if lanes and getattr(request, "resumable", False):
            raise UsageError("a request whose text comes piece by piece is not steered: send it whole")
        if not lanes and (salt or "").startswith(_SALT):
            raise UsageError(f"a cache_salt that begins with {_SALT!r} is that of steered requests: give another")
    except SteerableError as error:
        raise VLLMValidationError(str(error), parameter=KEY) from error
    remaining = {name: value for name, value in extra.items() if name not in (KEY, PROMPT_TOKENS)}
    if lanes:
        if any(row.is_latched for lane in lanes for row in lane.rows):
            params.skip_reading_prefix_cache = True  # the end of the prompt must pass, also after a preemption
        hangs = hangs_on_prompt(lanes)
        remaining[KEY] = to_wire(lanes, prompt, hangs)
        parts = [f"{_SALT}{identity(lanes)}"]
        if may_look_ahead(lanes) or hangs and not is_keyed_by_block():
            parts.append(str(prompt or length))
        request.cache_salt = "|".join([*parts, *([] if salt is None else [salt])])
    params.extra_args = remaining or None
    return request


def check_place(request: Any) -> None:
    """Refuse an HTTP request whose steering stands where vLLM does not look. Raises vLLM's validation error."""
    check_fields(request.model_extra or {}, request.vllm_xargs or {})


def check_fields(fields: Mapping[str, Any], extra: Mapping[str, Any], instead: str = IN_BODY) -> None:
    """The same, of the fields that a request has without vLLM's knowing them, and of its extra arguments. instead: what
    the client is told to do."""
    from vllm.exceptions import VLLMValidationError

    inside = [fields[name] for name in ("extra_args", "vllm_xargs") if isinstance(fields.get(name), Mapping)]
    names = [name for some in (fields, *inside) for name in some if str(name).lower().startswith("steer")]
    names += [name for name in extra if name.lower().startswith("steer") and name not in (KEY, PROMPT_TOKENS)]
    if names:
        raise VLLMValidationError(passed_over(names[0], instead), parameter=names[0])


def passed_over(name: str, instead: str = IN_BODY) -> str:
    """What is wrong with a request that asks by this name."""
    return f"{name!r} would be passed over here: {instead}"


def refuse_beams(request: Any) -> None:
    """Refuse an HTTP request for beams that asks to be steered. Raises vLLM's validation error."""
    check_place(request)
    if KEY in (request.vllm_xargs or {}):
        from vllm.exceptions import VLLMValidationError

        raise VLLMValidationError("vLLM's beam search drops the steering: leave beams out", parameter=KEY)


def _seed(params: Any, request: Any) -> int:
    """What a request's schedules draw from: its seed; without one it is another for each request."""
    return int.from_bytes(str(request.request_id).encode()) if params.seed is None else int(params.seed)


def _lanes(processor: Any, given: Any, seed: int) -> tuple[Lane, ...]:
    config = processor.vllm_config
    settings = settings_of(config.additional_config)
    if settings is None:
        raise UsageError(
            "this engine does not steer: start it with --additional-config '{\"steering\": {}}', or take the steering "
            "out of the request"
        )
    folder = Folder(settings.directions, live_directions(processor))
    steering = drawn(asked(given, folder), seed)
    lanes = check_steering(steering, config)
    gates = {i.gate for i in steering}
    if any(gate.uses("thinking", "answer") for gate in gates) or any(i.schedule.event == "close" for i in steering):
        think_tags(_tokenizer(processor))
    for gate in gates:
        if gate.uses("boundary"):
            resolve(gate, _tokenizer(processor))
    return lanes


def check_steering(steering: Steering, config: Any) -> tuple[Lane, ...]:
    """The lanes of a steering in an engine that steers, of vLLM's config. Raises UsageError for what it cannot do."""
    settings = settings_of(config.additional_config)
    assert settings is not None
    text = config.model_config.hf_text_config
    check_model(steering, config.model_config.model, text.num_hidden_layers, text.hidden_size, settings)
    if config.parallel_config.pipeline_parallel_size > 1:
        for i in steering:
            for leaf in i.gate.readings:
                if leaf.args[0].site != i.site:  # type: ignore[index]
                    raise UsageError(
                        f"{leaf} reads {leaf.args[0].site} for {i.site}, and with pipeline parallelism they may be in "  # type: ignore[index]
                        "different processes: use a direction for the gate that has this layer"
                    )
    steering = tuple(steering)
    return _LANES.get((steering, settings), lambda: lower(steering, settings))


_LANES: Kept[tuple[Lane, ...]] = Kept(256 << 20, lambda lanes: sum(len(lane.content) for lane in lanes))


@dataclass(frozen=True)
class _Text:
    """The steering of a text. versions: of the directions that it names."""

    steering: Steering
    versions: Mapping[str, Any]

    @property
    def size(self) -> int:
        return sum(i.basis.numel() * i.basis.element_size() for i in self.steering)


_TEXTS: Kept[_Text] = Kept(256 << 20, lambda text: text.size)


def asked(given: Any, folder: Folder) -> Steering:
    """`read_steering`, whose result is kept for a text as long as the directions that it names are the same."""
    if not isinstance(given, str):
        return read_steering(given, folder.load)

    def read() -> _Text:
        versions: dict[str, Any] = {}

        def load(name: str) -> Direction:
            versions[name], direction = folder.version(name)
            return direction

        return _Text(read_steering(given, load), versions)

    def is_fresh(text: _Text) -> bool:
        return all(folder.version(name)[0] == version for name, version in text.versions.items())

    return _TEXTS.get((given, folder.path), read, is_fresh).steering


def _tokenizer(processor: Any) -> Any:
    if processor.tokenizer is None:
        raise UsageError("a gate reads text, and the engine runs without a tokenizer (skip_tokenizer_init)")
    return processor.tokenizer


def live_directions(processor: Any) -> dict[str, Direction]:
    """The directions that requests of a processor may name, besides those of the folder (`VllmEngine.update`)."""
    return vars(processor).setdefault("steering_directions", {})  # type: ignore[no-any-return]


def read_steering(given: Any, load: Callable[[str], Direction] = EMPTY.load) -> Steering:
    """The steering that a request asks for. load: gives the directions that it names. Raises UsageError."""
    if isinstance(given, str) and given.lstrip()[:1] in ("[", "{"):
        try:
            value = strict_json(given)
        except ValueError as error:
            raise UsageError(f"the steering of the request is no sound JSON: {error}") from None
        if isinstance(value, list) and value and isinstance(value[0], dict) and "basis" in value[0]:
            return tuple(from_json(given, most=NUMBERS))
        given = value
    if isinstance(given, str):
        if len(given) > LONGEST:
            raise UsageError(f"the steering of the request has {len(given)} characters: expected {LONGEST} at most")
        return tuple(parse_steering(given, load))
    if isinstance(given, Mapping):
        given = [given]
    if isinstance(given, (list, tuple)) and given and all(isinstance(entry, Mapping) for entry in given):
        if len(given) > MOST:
            raise UsageError(f"the steering of the request has {len(given)} parts: expected {MOST} at most")
        return tuple(i for entry in given for i in _entry(entry, load))
    if isinstance(given, Intervention):
        given = (given,)
    return tuple(steering_of(given))


def _entry(entry: Mapping[str, Any], load: Callable[[str], Direction]) -> Program:
    if unknown := sorted(set(entry) - _ENTRY):
        raise UsageError(f"unknown key {unknown[0]!r} in the steering: expected {', '.join(sorted(_ENTRY))}")
    if ("direction" in entry) == ("vectors" in entry):
        raise UsageError("a steering names a direction, or holds vectors by layer, and this has both or neither")
    options = {name: value for name, value in entry.items() if name not in ("direction", "vectors")}
    direction = load(entry["direction"]) if "direction" in entry else _inline(entry["vectors"])
    strength = options.pop("strength", None)
    if strength is not None and (isinstance(strength, bool) or not isinstance(strength, (int, float))):
        raise UsageError(f"the strength of a steering is a number, not {strength!r}")
    if not isinstance(options.get("rescale", False), bool):
        raise UsageError(f"rescale is true or false, not {options['rescale']!r}")
    layers = options.get("layers")
    if layers is not None and not is_index(layers) and not (isinstance(layers, list) and all(map(is_index, layers))):
        raise UsageError(f"layers are a list of layers, like [2, 3], not {layers!r}")
    return direction.steering(strength, **options)


def _inline(vectors: Any) -> Direction:
    if not isinstance(vectors, Mapping) or not vectors:
        raise UsageError('vectors are an object of layers and numbers, like {"3": [0.1, ...]}')
    rows: dict[Site, Tensor] = {}
    for layer, numbers in vectors.items():
        site = Site.parse(f"resid_post.{layer}" if str(layer).isdigit() else str(layer))
        if site in rows:
            raise UsageError(f"the vectors have {site} twice")
        try:
            rows[site] = torch.tensor(numbers)
        except (TypeError, ValueError, RuntimeError):
            rows[site] = torch.tensor(False)
        if rows[site].dtype == torch.bool:
            raise UsageError(f"the vector at {site} is no list of numbers [d], or of such lists [k, d]")
        rows[site] = rows[site].float()
    return Direction(rows)


def check_model(steering: Steering, model: str, layers: int, width: int, settings: Settings) -> None:
    """Raises UsageError for a steering that does not fit the engine's model."""
    for i in steering:
        places = [("the steering acts", i.site, len(i.basis))]
        places += [(f"{leaf} reads", leaf.args[0].site, leaf.args[0].width) for leaf in i.gate.readings]  # type: ignore[index]
        for what, site, d in places:
            if site.layer >= layers:
                raise UsageError(f"{what} at {site}, and the model has layers 0 to {layers - 1}")
            if settings.layers is not None and site.layer not in settings.layers:
                raise UsageError(
                    f"{what} at {site}, and the engine was started to steer layers {listed(settings.layers)}"
                )
            if d != width:
                raise UsageError(
                    f"the vector at {site} has width {d}, but the model's width there is {width}: use a direction made "
                    "on this model"
                )
        here, made = short_name(model), short_name(i.source.model_id)
        if not may_be_same(here, made):
            raise UsageError(f"the direction {i.source.name!r} was made on {made!r}, and the engine serves {here!r}")
