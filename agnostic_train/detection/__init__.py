"""Detection of each language's neurons, by impacts that passed the self-check or by firing rates."""
