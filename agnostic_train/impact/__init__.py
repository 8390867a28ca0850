"""How much each neuron matters to its own layer's output."""
