"""Dividing a backbone into blocks."""
