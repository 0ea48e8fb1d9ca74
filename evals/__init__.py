"""Evaluations and benchmarks, each runnable as `python -m compress.evals.<name>`."""
