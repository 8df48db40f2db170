"""Recipes: from what people have (photos, classes) to a table with one row for each sample."""
