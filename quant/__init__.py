"""Quantisation: codebooks, packing and the modules that run on them."""
