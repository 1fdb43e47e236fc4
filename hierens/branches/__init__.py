"""How copies of a block are stored and executed: looped, grouped or fused."""
