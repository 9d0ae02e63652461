"""`steerable serve`: vLLM's own OpenAI server, with the plugin switched on."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from steerable.engines.vllm.engine import installed
from steerable.engines.vllm.presets import VARIABLE, parse_presets
from steerable.engines.vllm.settings import Settings, with_sizes
from steerable.models.loading import short_name
from steerable.models.sources import find
from steerable.steering.site import parse_layers
from steerable.store.display import Display
from steerable.store.errors import SteerableError, UsageError

_GROUPS = ("vllm.general_plugins", "vllm.stat_logger_plugins", "vllm.platform_plugins", "vllm.io_processor_plugins")
"""Those of vLLM whose plugins are loaded unless VLLM_PLUGINS leaves them out; those with routes are loaded by name."""


def serve(
    model: str = "pocket",
    options: Sequence[str] = (),
    *,
    directions: Path = Path("directions"),
    preset: Sequence[str] = (),
    host: str = "127.0.0.1",
    port: int = 8000,
    lanes: int = 2,
    maps: int = 1,
    rank: int = 2,
    gates: int = 1,
    layers: str | None = None,
    display: Display | None = None,
) -> None:
    """Serve a model with vLLM's OpenAI server, steered anew for every request.

    Any OpenAI client steers by the model's name ("pocket:happy" for the direction happy of the folder), or by
    `vllm_xargs={"steering": "0.5 happy@thinking - 0.2 verbose"}`. Directions are put, listed and removed at
    /v1/steering/directions. An API key (VLLM_API_KEY, or `-- --api-key KEY`) guards them as it does the rest.

    Args:
        model: 'pocket', 'smol', 'smol-think', a folder or a hub name.
        options: Options of `vllm serve`, behind --.
        directions: The folder of direction files; made where it is not there.
        preset: NAME=STEERING, a further model name and what it stands for. Repeatable.
        host: Address to listen at.
        port: Port to listen at.
        lanes: Additions with different gates or schedules that one request may have.
        maps: Other maps (ablate, clip, rotate, affine) that one request may have at a layer; 0 makes it faster.
        rank: Rows that such a map may have.
        gates: Conditions on activations (`when`, `probe`) that one request may have at a layer; 0 makes it faster.
        layers: Layers that can be steered, e.g. 12,16; default: all.
        display: Where progress is shown; default: nowhere.

    Raises:
        UsageError: vLLM is not installed, or the settings do not go together.

    Example:
        steerable serve pocket --directions directions --preset "merry=0.5 happy@thinking" -- --max-model-len 1024
    """
    installed()
    source = find(model)
    if source.gguf_file is not None:
        raise UsageError("vLLM serves no GGUF file here: unpack it first")
    directions.mkdir(parents=True, exist_ok=True)
    chosen = parse_layers(layers)
    settings = Settings(
        lanes, maps, rank, gates, None if chosen is None else tuple(chosen), directions=str(directions.resolve())
    )
    steering = {name: value for name, value in vars(settings).items() if name != "code"}
    os.environ[VARIABLE] = json.dumps(parse_presets(preset))
    os.environ["VLLM_PLUGINS"] = ",".join(_allowed(os.environ.get("VLLM_PLUGINS")))
    os.environ["VLLM_USE_RUST_FRONTEND"] = "0"  # it would take requests past the plugin
    names = ["--model", source.place, "--served-model-name", short_name(model), "--host", host, "--port", str(port)]
    _run([*names, *options], steering)


def _allowed(given: str | None) -> list[str]:
    """The plugins that vLLM may load: those that it would load by itself, and this package's."""
    names = (
        [point.name for group in _GROUPS for point in entry_points(group=group)] if given is None else given.split(",")
    )
    return list(dict.fromkeys([*names, "steerable"]))


def _run(arguments: list[str], steering: dict[str, Any]) -> None:
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    args = make_arg_parser(FlexibleArgumentParser(prog="steerable serve ... --")).parse_args(arguments)
    if args.grpc:
        raise UsageError("gRPC has no field for a steering, and no model names: leave out --grpc")
    args.additional_config = with_sizes(args.additional_config, steering)
    try:
        validate_parsed_serve_args(args)
        ServeSubcommand.cmd(args)  # one API server or several, engines here or elsewhere: as `vllm serve` does it
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise SteerableError(f"vLLM does not serve: {error}") from error
