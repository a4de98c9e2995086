"""The annotation store, and what feeds it."""
