"""Evaluation: protocols, scorers, and the report."""
