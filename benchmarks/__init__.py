"""Measurements of this package against other implementations of the same computation."""
