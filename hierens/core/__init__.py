"""The basis of all other packages: trees, predictions, costs, files, and the base class of models."""
