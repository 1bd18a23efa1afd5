"""Experiments: a recipe over seeds with its tables, pictures and model cards, and ablations of it."""
