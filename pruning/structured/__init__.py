"""Structured pruning: whole heads, channels or blocks of a model go."""
