"""What a model costs, found out without running it."""
