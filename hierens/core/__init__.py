"""What the other packages build on: trees, nested predictions, costs, and what every network here offers."""
