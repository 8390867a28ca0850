"""Training of chosen neurons alone."""
