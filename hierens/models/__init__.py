"""The networks: trees, multi-exit networks and trees with exits; functions that create, change and load them."""
