"""Data between the stages: prompts, the annotation store, packs over it and the batches made from them."""
