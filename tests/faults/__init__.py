"""Faults on purpose, under load, and a count of what they did: see README.md beside this."""
