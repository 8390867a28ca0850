"""Hugging Face models: finding their projections, loading and running them, estimating their memory."""
