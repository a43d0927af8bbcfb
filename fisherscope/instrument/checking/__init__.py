"""Whether what is collected is right: proofs of batches, state between passes, a store's own model."""
