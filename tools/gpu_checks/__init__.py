"""Steps of tools/gpu_check.py: each a function that measures one thing and reports lines."""
