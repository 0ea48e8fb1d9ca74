"""Measure parts of this library: ``python -m compress.evals.bench NAME``; ``--help`` lists what there is."""
