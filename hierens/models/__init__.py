"""The networks: trees, multi-exit networks, trees with exits, and what changes them."""
