"""Tests of the command npd."""
