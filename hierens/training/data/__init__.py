"""Data sets, their splits, and reading images."""
