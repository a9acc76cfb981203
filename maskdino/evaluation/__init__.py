"""Evaluators by task, and reports of what they found."""
