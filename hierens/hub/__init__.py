"""Saved models: writing, checking and publishing them."""
