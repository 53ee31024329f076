"""Scores beside their baselines: accuracy, novelty, and the table that shows a generator next to what it must beat."""
