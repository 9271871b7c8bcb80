"""Measures how fast events are taken, as ratios of what PostgreSQL itself can do.

`python -m tests.bench --help` explains the flags; docs/performance.md the method.
"""
