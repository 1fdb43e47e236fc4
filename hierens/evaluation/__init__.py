"""Costs and accuracy of models: profiles, metrics, plots and tables."""
