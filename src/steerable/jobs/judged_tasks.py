"""The tasks of a comparison: drawn once into its run folder, each with an answer that can be judged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from steerable.chains.records import Record, content_hash, read_jsonl, write_jsonl
from steerable.chains.tasks import make_tasks
from steerable.store.errors import UsageError
from steerable.store.plurals import counted, plural
from steerable.store.run_folder import RunFolder, sha256


def draw(folder: RunFolder, source: str, limit: int, seed: int, exclude: Sequence[str | Path]) -> list[Record]:
    """`limit` tasks of a source in `folder`/tasks.jsonl, none that stands in the files `exclude`; drawn once.

    Raises UsageError for a source without reference answers.
    """
    if source.partition(":")[0] == "llm":
        raise UsageError("tasks that a language model writes have no reference answers: give another source of tasks")
    seen = sorted({content_hash(task) for file in exclude for task in read_jsonl(file, "task")})
    settings = {"tasks": source, "limit": limit, "seed": seed, "exclude": seen}
    if Path(source).exists():
        settings["tasks_sha256"] = sha256(Path(source))

    def work(_: Path) -> None:
        drawn = make_tasks(source, limit, seed, seen)
        if open_ended := sum(task.get("answer") is None and task.get("entry") is None for task in drawn):
            raise UsageError(
                f"{open_ended} of {counted(len(drawn), 'task')} {plural(open_ended, 'has', 'have')} neither an answer "
                "nor an entry, so nobody can judge them: give tasks with reference answers (docs/tasks.md)"
            )
        write_jsonl(folder / "tasks.jsonl", drawn)

    folder.run_stage("tasks", [], settings, ["tasks.jsonl"], work)
    return read_jsonl(folder / "tasks.jsonl", "task")
