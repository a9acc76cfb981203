"""Families of benchmarks behind tools/benchmark.py."""
