"""Where a backbone is cut into blocks, and the blocks."""
