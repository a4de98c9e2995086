"""The near-policy loop: rounds of rollout, annotation, selection, packing and training with sparse updates."""
