"""What the other packages build on: trees, predictions, costs, files, and the base class of every model."""
