"""Engines: generate and capture with the same interventions."""
