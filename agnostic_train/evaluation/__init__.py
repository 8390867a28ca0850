"""Evaluation: which model is better, by how much, and whether the difference is statistically significant."""
