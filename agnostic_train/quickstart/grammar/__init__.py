"""What a sentence means, and one module per language that says it."""
