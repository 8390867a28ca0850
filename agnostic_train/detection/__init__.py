"""Which neurons are a language's: impacts that passed the self-check, counted over its sentences."""
