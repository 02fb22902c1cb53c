"""Mutants: do the tests notice a small wrong change? ``python -m tools.mutate``."""
