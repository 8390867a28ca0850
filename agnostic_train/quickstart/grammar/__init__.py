"""The meanings of sentences, and one module per language that renders them."""
