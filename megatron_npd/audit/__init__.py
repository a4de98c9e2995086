"""A run looked at: its books, its report, one sample of it."""
