"""Experiments that a grid cannot say; they work in a clone and are not in the wheel."""
