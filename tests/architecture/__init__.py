"""Rules about the repository that no compiler checks."""
