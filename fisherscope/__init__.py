"""Per-sample gradients, Fisher information and interference for every attention head of a HF model."""
