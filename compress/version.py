"""Version of the library; part of every workspace key and manifest."""

__version__ = "0.1.0"
