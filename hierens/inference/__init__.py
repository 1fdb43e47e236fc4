"""How much to compute: policies, and what they are calibrated by."""
