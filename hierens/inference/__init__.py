"""Policies, which choose how much of a model is evaluated, and their calibration."""
