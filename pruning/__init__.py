"""Pruning: scores, sparsity allocation, unstructured and structured removal."""
