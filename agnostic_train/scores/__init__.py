"""What neurons are worth: perplexities with and without them, and the scores made of these."""
