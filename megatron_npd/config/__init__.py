"""Settings of every stage, and the command line that gives them."""
