"""The main job's cost: `steerable run` on the bundled model, this commit against an earlier one, in CPU seconds.

    python benchmarks/main_job.py [--before 8f787af] [--after HEAD] [--seed 0] [--out benchmarks/results/main_job.json]

Each commit is checked out in a git worktree of its own under a temporary folder and run by this Python in a process of
its own, one worker, one thread, one after the other. CPU seconds are user and system time, children included, so that a
busy machine does not count. `--quick` adds the cost of `steerable run --quick`. The result also has the eight effects
(four behaviours, up and down): whether the steered interval lies outside those of both controls.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "main_job.json"

# Runs the command line of whichever version is on the path; writes the CPU seconds of each stage and of all.
TIMED = """
import importlib.util, json, resource, sys

def spent():
    uses = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in uses)

if __name__ == "__main__":
    moved = importlib.util.find_spec("steerable.store") is not None
    RunFolder = importlib.import_module("steerable.store.run_folder" if moved else "steerable.runfolder").RunFolder
    do, stages, file = RunFolder.run_stage, {}, sys.argv.pop(1)

    def timed(self, stage, *arguments):
        before = spent()
        done = do(self, stage, *arguments)
        stages[stage] = round(spent() - before, 2)
        return done

    RunFolder.run_stage = timed
    from steerable import cli
    cli.main()
    with open(file, "w") as out:
        json.dump({"total": round(spent(), 2), "stages": stages}, out)
"""


def run(commit: str, folder: Path, *options: str) -> dict[str, Any]:
    """CPU seconds of `steerable run` at a commit, and what its report says of the eight effects."""
    tree, name = folder / f"tree-{commit}", "-".join([commit, *options]).replace("--", "")
    if not tree.exists():
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "--quiet", "--detach", tree, commit], check=True)
    script, times, out = folder / "timed.py", folder / f"{name}.json", folder / f"run-{name}"
    script.write_text(TIMED)
    threads = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run(
        [sys.executable, script, times, "run", "--workers", "1", "--out", out, *options],
        env=os.environ | threads | {"PYTHONPATH": str(tree / "src")},
        cwd=folder,
        check=True,
    )
    return {**json.loads(times.read_text()), "effects": effects(json.loads((out / "report.json").read_text()))}


def effects(report: dict[str, Any]) -> dict[str, bool]:
    """Of each behaviour, up and down at its strength: does the steered interval of its share miss both controls'?"""
    outside = {}
    for behaviour, chosen in report["selection"].items():
        size = chosen.get("strength", 1.0)
        for strength in (-size, size):
            cells = [c for c in report["cells"] if c["behaviour"] == behaviour and c["strength"] == strength]
            controls = [c["fractions"][behaviour] for c in cells if c["control"]]
            steered = next(
                c["fractions"][behaviour]
                for c in cells
                if not c["control"] and c["where"] == "all" and c["layers"] == [chosen["layer"]]
            )
            outside[f"{behaviour} {strength:+g}"] = len(controls) == 2 and all(
                steered[2] < control[1] if strength < 0 else steered[1] > control[2] for control in controls
            )
    return outside


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", default="8f787af")
    parser.add_argument("--after", default="HEAD")
    parser.add_argument("--seed", default="0")
    parser.add_argument("--quick", action="store_true", help="also `steerable run --quick` of the later commit")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            before = run(arguments.before, Path(folder), f"--seed={arguments.seed}")
            after = run(arguments.after, Path(folder), f"--seed={arguments.seed}")
            quick = run(arguments.after, Path(folder), "--quick") if arguments.quick else None
        finally:
            for tree in Path(folder).glob("tree-*"):
                subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", tree], check=False)
    result = {
        "seed": int(arguments.seed),
        "commits": {"before": arguments.before, "after": arguments.after},
        "cpu_seconds": {"before": before, "after": after} | ({"quick": quick} if quick else {}),
        "ratio": round(after["total"] / before["total"], 3),
        "machine": platform.machine(),
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
