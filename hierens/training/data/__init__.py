"""Data sets, their splits, and how images are read from them."""
