"""Comparing methods at equal budget: `clex compare`."""
