"""Writing, checking and publishing saved models."""
