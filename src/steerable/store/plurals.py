"""Counts in sentences: `1 step`, `2 steps`."""


def plural(count: float, one: str, many: str = "") -> str:
    """The noun (with its verb, if it has one) that stands behind a count: `plural(n, "step")`, `plural(n, "entry",
    "entries")`, `plural(n, "step was", "steps were")`; without `many` an s is added."""
    return one if count == 1 else many or f"{one}s"


def counted(count: float, one: str, many: str = "") -> str:
    """A count with its noun, thousands parted by commas: `1 step`, `1,024 steps`, `0.5 GPUs`."""
    return f"{count:,} {plural(count, one, many)}"
