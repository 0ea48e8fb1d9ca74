"""Grids of recipes behind the tables of this library: what runs them, and the grids themselves."""
