"""Perplexities with and without sets of neurons, and the scores computed from them."""
