"""How copies of a block are held and run: looped, grouped, fused, tuned."""
