"""Recipes: from one YAML file to an adapted model."""
