"""Scores of classifiers (accuracy.py) and of samples against real images (features.py, distance.py)."""
