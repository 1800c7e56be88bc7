"""Categories, contributions and similarity of every neuron."""
