"""Trained models in use: the predictor, and what it looks at."""
