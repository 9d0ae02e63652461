"""What `accelerate launch` starts in every process: the training of a run folder that has settings and tasks."""

from __future__ import annotations

import os
import sys

import torch

from steerable.methods.train import launcher
from steerable.methods.train.loop import train
from steerable.methods.train.rl import open_model
from steerable.methods.train.settings import from_dict
from steerable.store.display import Display
from steerable.store.errors import SteerableError, UsageError
from steerable.store.run_folder import RunFolder, read_json


def main() -> None:
    launcher.end_with_launcher()
    first = os.environ.get("RANK", "0") == "0"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))  # "cuda" is then this process's own
    folder = RunFolder(sys.argv[1])
    try:
        settings = from_dict(read_json(folder / "config.json"))
        if settings.trust_remote_code and launcher.LAUNCHER not in os.environ:
            raise UsageError("config.json asks for trust_remote_code, which no file may: use `steerable train rl`")
        display = Display(quiet=not first or launcher.LAUNCHER in os.environ)
        train(folder.root, settings, open_model(settings), display)
    except (UsageError, SteerableError) as error:
        sys.exit(launcher.report(error))


if __name__ == "__main__":
    main()
