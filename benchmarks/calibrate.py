"""What the search of `steerable calibrate` costs and gives away beside the full grid of layers and strengths.

    steerable run --model pocket --out runs/pocket
    python benchmarks/calibrate.py --run runs/pocket      # benchmarks/results/calibrate.json; goes on where it stopped

Behaviours of the run, more of them or less, and shorter thinking, on tasks of their own: each a calibration with
`--full-grid`, in which the search chooses first, and the rest of the grid is measured after that. The search is to
cost at most a quarter of the grid's tokens, and to end at most one step of the grid (a layer, or a strength) from the
grid's best setting, or with a gain that is at most as much smaller as one step changes it there.
"""

from __future__ import annotations

import argparse
import importlib.metadata
from pathlib import Path
from typing import Any

from steerable.jobs.calibration_job import calibrate_files
from steerable.store.run_folder import write_json

RESULTS = Path(__file__).parent / "results" / "calibrate.json"
TARGETS = (  # of whose vector, at what, more or less of it
    ("backtracking", "backtracking", "more"),
    ("backtracking", "backtracking", "less"),
    ("uncertainty-estimation", "uncertainty-estimation", "more"),
    ("example-testing", "example-testing", "more"),
    ("adding-knowledge", "adding-knowledge", "less"),
    ("adding-knowledge", "thinking", "less"),
)
KEPT = ("steps", "lost", "step", "search", "grid", "share")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/pocket"))
    parser.add_argument("--out", type=Path, default=Path("runs/calibrate-grid"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--validation", type=int, default=40, help="tasks of each calibration")
    parser.add_argument("--to", type=Path, default=RESULTS)
    args = parser.parse_args()
    versions = {package: importlib.metadata.version(package) for package in ("steerable", "torch", "transformers")}
    rows: list[dict[str, Any]] = []
    for seed in args.seeds:
        for behaviour, target, aim in TARGETS:
            made = calibrate_files(
                [args.run / f"vectors/candidates/onset.pooled/{behaviour}.safetensors"],
                model="pocket", target=target, aim=aim, full_grid=True, seed=seed, validation=args.validation,
                out=args.out / f"{target}-{aim}-{seed}", workers=1,
            )  # fmt: skip
            cost, first = made["cost"], made["rounds"][-1]["survivors"][0]
            rows.append(
                {
                    "target": target, "aim": aim, "seed": seed, "settings": len(made["grid"]),
                    "chosen": first, "is_recommended": made["recommended"] is not None, "reason": made["reason"],
                    "best": cost.get("best"), **{key: cost.get(key) for key in KEPT},
                }
            )  # fmt: skip
            print(rows[-1], flush=True)
            write_json(args.to, {"model": "pocket", "tasks": args.validation, "rows": rows, "versions": versions})


if __name__ == "__main__":
    main()
