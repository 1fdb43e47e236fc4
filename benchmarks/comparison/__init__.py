"""Comparisons on a common recipe: training, records, and the evaluation of records."""
