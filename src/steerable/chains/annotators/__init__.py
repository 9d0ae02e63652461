"""Annotators: from a chain of thought to labelled spans."""
