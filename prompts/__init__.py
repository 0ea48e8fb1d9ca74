"""Soft prompts that recover a compressed model."""
