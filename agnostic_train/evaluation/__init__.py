"""Which model is better, by how much, and whether that is more than noise."""
