"""Soft prompts: virtual tokens trained on a compressed model to win back what compression cost."""
