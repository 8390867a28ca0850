"""Hugging Face models: where their projections are, how to load, run and measure them, what memory they take."""
