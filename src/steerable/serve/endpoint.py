"""What vLLM's OpenAI server is given besides (entry point `vllm.endpoint_plugins`): routes, presets and metrics.

    GET    /v1/steering/directions          what there is
    GET    /v1/steering/directions/{name}   one direction file
    PUT    /v1/steering/directions/{name}   put it there, or another in its place: a direction file as the body
    DELETE /v1/steering/directions/{name}
    GET    /v1/steering                     layers and slots of every worker

They lie under /v1, which vLLM's own API key guards. Requests that run keep the vectors that they came with.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial, wraps
from http import HTTPStatus
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from steerable.engines.vllm.folder import MAX_BYTES, Folder
from steerable.engines.vllm.presets import VARIABLE, Models, Presets
from steerable.engines.vllm.requests import IN_BODY, PEERS, asked, check_fields, check_steering, passed_over
from steerable.engines.vllm.settings import KEY, settings_of
from steerable.serve.metrics import Measured, count_requests
from steerable.steering.direction import Direction
from steerable.steering.spec import drawn
from steerable.store.errors import SteerableError, UsageError

_PATH = "/v1/steering"
_READING = {
    "ChatCompletionRequest", "BatchChatCompletionRequest", "CompletionRequest", "ResponsesRequest",
    "TokenizeCompletionRequest", "TokenizeChatRequest", "DetokenizeRequest", "DerenderChatRequest",
    "DerenderCompletionRequest", "DerenderChatStreamRequest", "DerenderCompletionStreamRequest",
}  # fmt: skip
"""Requests of vLLM that are steered by the model's name, or that only turn text into tokens and back."""
_IN_PARAMS = f'a steering is "sampling_params": {{"extra_args": {{"{KEY}": "0.5 happy"}}}}'
_FORGETTING = (
    ("vllm.entrypoints.anthropic.serving", "AnthropicServingMessages", "create_messages", IN_BODY),
    ("vllm.entrypoints.cohere.serving", "CohereServingChatV2", "create_chat_v2", "a steering is the model's name"),
    ("vllm.entrypoints.scale_out.token_in_token_out.serving", "ServingTokens", "serve_tokens", _IN_PARAMS),
)
"""Modules of vLLM's server, classes, and methods whose requests keep no field that they do not know; and how these are
steered."""


class Endpoint:
    """The plugin as vLLM asks for it."""

    name = "steerable"
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        """Add the routes to vLLM's application, and have it measure before its metrics are read."""
        app.add_middleware(Measured, ask=self.engines)
        app.add_api_route(_PATH, self.status, methods=["GET"])
        app.add_api_route(f"{_PATH}/directions", self.list_directions, methods=["GET"])
        for method, answer in (("GET", self.get), ("PUT", self.put), ("DELETE", self.delete)):
            app.add_api_route(f"{_PATH}/directions/{{name}}", answer, methods=[method])

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Learn of the engine, and have vLLM's requests read model names."""
        self.engine, self.config = engine_client, engine_client.vllm_config
        settings = settings_of(self.config.additional_config)
        if settings is None:
            raise UsageError("this server does not steer: start it by `steerable serve`")
        try:
            await self.engines()
        except Exception as error:
            raise UsageError(
                "an engine of this server does not steer: start those of other machines (--headless) by `steerable "
                "serve`, too"
            ) from error
        self.folder = Folder(settings.directions)
        models = state.openai_serving_models
        paths = models.base_model_paths
        given = json.loads(os.environ.get(VARIABLE, "{}"))
        bases = [path.name for path in paths]
        self.presets = Presets(self.folder, given, bases, lambda name: name in getattr(models, "lora_requests", ()))
        registry = getattr(models, "registry", models)
        models.base_model_paths = registry.base_model_paths = Models(paths, self.presets)
        self._read_names()

    def _read_names(self) -> None:
        """Steer the requests that name a preset, and refuse at once, with 400 also for streams, what cannot be done."""
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.entrypoints.openai.completion.protocol import CompletionRequest
        from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
        from vllm.entrypoints.serve.engine.serving import BaseServing
        from vllm.exceptions import VLLMValidationError

        def steered(request: Any, params: Any) -> Any:
            extra = dict(getattr(params, "extra_args", None) or {})
            try:
                if odd := [name for name in PEERS if name in extra]:
                    raise UsageError(passed_over(odd[0]))
                preset = self.presets.steering(request.model)
                if preset is not None and KEY in extra:
                    raise UsageError(
                        f"the model {request.model!r} is a steering, and the request has another: give one"
                    )
                if (given := extra.get(KEY, preset)) is not None:
                    check_steering(drawn(asked(given, self.folder), 0), self.config)
                    count_requests()
                    params.extra_args = {**extra, KEY: given}
            except SteerableError as error:
                raise VLLMValidationError(str(error), parameter=KEY) from error
            return params

        def refused(request: Any, params: Any) -> Any:
            try:
                preset = self.presets.steering(request.model)
            except SteerableError as error:
                raise VLLMValidationError(str(error), parameter="model") from error
            if preset is not None:
                raise VLLMValidationError("vLLM's beam search drops the steering: leave beams out", parameter=KEY)
            return params

        for cls in (ChatCompletionRequest, CompletionRequest, ResponsesRequest):
            _after(cls, "to_sampling_params", steered)
            if hasattr(cls, "to_beam_search_params"):
                _after(cls, "to_beam_search_params", refused)
        _instead(BaseServing, "_check_model", self._check_model)
        for module, name, method, instead in _FORGETTING:
            if module in sys.modules:
                _instead(getattr(sys.modules[module], name), method, partial(_check_body, instead))

    async def _check_model(self, original: Any, serving: Any, request: Any) -> Any:
        """vLLM's own check of the model's name, after which some routes do not look at it again."""
        from vllm.exceptions import VLLMValidationError

        error = await original(serving, request)
        if error is not None or type(request).__name__ in _READING:
            return error
        tokens = getattr(getattr(request, "sampling_params", None), "extra_args", None) or {}
        try:
            instead = _IN_PARAMS if hasattr(request, "sampling_params") else "this route does not steer"
            check_fields(getattr(request, "model_extra", None) or {}, tokens, instead)
        except VLLMValidationError as wrong:
            return serving.create_error_response(wrong)
        if KEY in tokens:
            return None
        try:
            preset = self.presets.steering(request.model)
        except SteerableError as missing:
            return serving.create_error_response(str(missing), "NotFoundError", HTTPStatus.NOT_FOUND, "model")
        if preset is not None:
            return serving.create_error_response(
                f"the model {request.model!r} is a steering, and this route does not steer: take "
                f"{request.model.rpartition(':')[0]!r}, or a route of completions, chats or responses",
                param="model",
            )
        return None

    async def status(self) -> Any:
        """What every worker steers: layers, and how many slots of vectors and maps are filled."""
        engines = await self.engines()
        return {"workers": [{"engine": n, **worker} for n, workers in enumerate(engines) for worker in workers]}

    async def engines(self) -> Any:
        """`Steps.status` of every worker of each engine. (`collective_rpc` asks all data-parallel engines, too, but
        says what the first one answers.)"""
        call = ("collective_rpc", "steering_status", None, (), None)
        return await self.engine.engine_core.call_utility_all_async(*call)

    async def list_directions(self) -> Any:
        """All directions of the folder; of a file that is none, why."""
        rows = []
        for name in self.folder.names():
            try:
                rows.append(_about(name, self.folder.load(name)))
            except SteerableError as error:
                rows.append({"id": name, "object": "steering.direction", "error": str(error)})
        return {"object": "list", "data": rows}

    async def get(self, name: str) -> Any:
        """One direction file."""
        try:
            return Response(self.folder.load(name).to_bytes(), media_type="application/octet-stream")
        except SteerableError as error:
            return _error(404, str(error))

    async def put(self, name: str, request: Request) -> Any:
        """Take a direction file in."""
        content = bytearray()
        async for part in request.stream():
            content += part
            if len(content) > MAX_BYTES:
                return _error(413, f"a direction file has {MAX_BYTES >> 20} MiB at most")
        if name in self.presets.given:
            return _error(409, f"--preset gives {name!r} another meaning on this server: take another name")
        try:
            is_new = name not in self.folder.names()
            direction = self.folder.put(
                name, bytes(content), lambda direction: check_steering(drawn(direction.steering(), 0), self.config)
            )
        except SteerableError as error:
            return _error(400, str(error))
        return JSONResponse(_about(name, direction), 201 if is_new else 200)

    async def delete(self, name: str) -> Any:
        """Remove a direction."""
        try:
            self.folder.remove(name)
        except SteerableError as error:
            return _error(404, str(error))
        return Response(status_code=204)


async def _check_body(instead: str, original: Any, serving: Any, request: Any, raw_request: Any = None) -> Any:
    """Refuse the fields that a route's request forgets as it is read."""
    if raw_request is not None:
        body = await raw_request.json()
        check_fields({name: body[name] for name in body.keys() - type(request).model_fields.keys()}, {}, instead)
    return await original(serving, request, raw_request)


def _after(cls: type, name: str, change: Any) -> None:
    """Pass what a method of vLLM returns through a function of the object and it."""
    _instead(cls, name, lambda original, self, *args, **kwargs: change(self, original(self, *args, **kwargs)))


def _instead(cls: type, name: str, other: Any) -> None:
    """Call a function of the method and what it is given in place of a method of vLLM."""
    original = getattr(getattr(cls, name), "steerable_original", getattr(cls, name))

    @wraps(original)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return other(original, self, *args, **kwargs)

    wrapped.steerable_original = original  # type: ignore[attr-defined]
    setattr(cls, name, wrapped)


def _about(name: str, direction: Direction) -> dict[str, Any]:
    return {
        "id": name,
        "object": "steering.direction",
        "layers": direction.layers,
        "map": direction.map,
        "where": str(direction.gate),
        "strength": direction.strength,
        "behaviour": direction.behaviour,
        "model": direction.model_id,
    }


def _error(status: int, message: str) -> JSONResponse:
    kind = {404: "NotFoundError", 409: "ConflictError"}.get(status, "BadRequestError")
    return JSONResponse({"error": {"message": message, "type": kind, "param": "steering", "code": status}}, status)
