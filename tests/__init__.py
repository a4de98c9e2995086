"""Tests, in the package's own layout; builders shared by them are in tests/helpers.py."""
