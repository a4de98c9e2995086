"""The losses and the top-k extraction: they depend on nothing else of the package but its error class."""
