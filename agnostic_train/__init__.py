"""Find the neurons that carry a language in a Hugging Face model, and train only those."""
