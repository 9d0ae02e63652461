"""Whose passes a thread runs."""

from __future__ import annotations

import sys


def waits_for_batch(thread: int) -> bool:
    """Whether a thread is inside transformers' `generate_batch`, which runs the model in a thread of its own."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_code.co_name == "generate_batch":
            return True
        frame = frame.f_back
    return False
