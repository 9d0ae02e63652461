"""The run's report: `report.json` drawn as one self-contained page that loads nothing from anywhere."""

from steerable.pages.run_page import render, write_report

__all__ = ["render", "write_report"]
