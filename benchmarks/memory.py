"""Peak resident memory of the two commands that people try first on a real model of 135 M parameters.

    steerable fetch smol
    python benchmarks/memory.py [--check]

Each command runs by itself. Several times a second the resident memory of its process and all of that one's children
is summed up, as the operating system counts it: interpreter, libraries and mapped weights are in it. The run is a short
one with as many rows as a full one, as their number follows from the room that they get. --check ends with 1 where a
command is above its bar.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "memory.json"
COMMANDS = {
    "run": (
        "steerable run --model smol --out run --behaviours initializing,deduction --limit 64 --validation 2 "
        "--evaluation 4 --samples 2 --side-tasks 2 --sweep '' --controls 1 --max-new-tokens 80 --window onset "
        "--tried 1 --attributed 8 --patched 2 --compared 2"
    ),
    "contrast": "steerable contrast examples/contrasts/happy-sad.jsonl --model smol --out happy.safetensors",
}
BARS = {"run": 2.5, "contrast": 1.2}  # GiB
EVERY = 0.2  # seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="end with 1 where a command is above its bar")
    parser.add_argument("--only", choices=COMMANDS, help="measure this command alone, and write nothing")
    options = parser.parse_args()
    names = [options.only] if options.only else list(COMMANDS)
    measured = {name: measure(COMMANDS[name]) | {"bar_gib": BARS[name]} for name in names}
    for name, row in measured.items():
        print(f"{name:10} {row['peak_gib']:6.2f} GiB, bar {row['bar_gib']:.1f} GiB, {row['seconds']:.0f} s")
    if not options.only:
        content = {"commands": measured, "machine": platform.machine(), "cores": psutil.cpu_count()}
        RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    if options.check and any(row["peak_gib"] >= row["bar_gib"] for row in measured.values()):
        sys.exit(1)


def measure(command: str) -> dict[str, Any]:
    """Run a command to its end: what it was, its peak in GiB, the most processes it had, and how long it took."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "examples").symlink_to(ROOT / "examples")
        began, peak, most = time.monotonic(), 0, 0
        words = [sys.executable, "-m", *shlex.split(command), "--json"]
        job = subprocess.Popen(words, cwd=folder, stdout=subprocess.DEVNULL)
        while job.poll() is None:
            sizes = resident(psutil.Process(job.pid))
            peak, most = max(peak, sum(sizes)), max(most, len(sizes))
            time.sleep(EVERY)
    if job.returncode:
        raise SystemExit(f"`{command}` ended with {job.returncode}")
    seconds = round(time.monotonic() - began, 1)
    return {"command": command, "peak_gib": round(peak / 2**30, 3), "processes": most, "seconds": seconds}


def resident(process: psutil.Process) -> list[int]:
    """Bytes of a process and each of its descendants; none of those that have just ended."""
    sizes = []
    try:
        for one in [process, *process.children(recursive=True)]:
            sizes.append(one.memory_info().rss)
    except psutil.NoSuchProcess:
        pass
    return sizes


if __name__ == "__main__":
    main()
