"""Runs a step of the script for the first minutes on a GPU, where the library is imported already."""

import sys

from compress.evals.bench.gpu_steps import main

main(*sys.argv[1:])
