"""Weights and training states: writing, reading, and those of the released models."""
