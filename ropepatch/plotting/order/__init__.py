"""Pictures of how a model knows order: tables, rotations, biases and remapped distances."""
