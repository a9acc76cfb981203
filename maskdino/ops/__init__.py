"""Operators that the model is built on; this package imports torch only."""
