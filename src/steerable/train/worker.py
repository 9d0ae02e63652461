"""What `accelerate launch` starts in every process: the training of a run folder that has settings and tasks."""

from __future__ import annotations

import os
import sys

from steerable.display import Display
from steerable.errors import SteerableError, UsageError
from steerable.runfolder import RunFolder, read_json
from steerable.train.loop import train
from steerable.train.rl import open_model
from steerable.train.settings import from_dict


def main() -> None:
    folder = RunFolder(sys.argv[1])
    settings = from_dict(read_json(folder / "config.json"))
    try:
        train(folder.root, settings, open_model(settings), Display(quiet=os.environ.get("RANK", "0") != "0"))
    except (UsageError, SteerableError) as error:
        sys.stderr.write(f"steerable: {' '.join(str(error).split())}\n")
        sys.exit(2 if isinstance(error, UsageError) else 1)


if __name__ == "__main__":
    main()
