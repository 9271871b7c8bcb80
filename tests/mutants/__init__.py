"""Change the code in small ways, and see whether a test notices: `make mutants`.

Written for this repository because the rules that matter here stand in tables and in SQL at
the top of modules, where the mutation testers at hand change nothing.
"""
