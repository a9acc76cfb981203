"""Preparation of downloaded datasets, one command each."""
