"""Recipes compared in one run: quality against size against speed, as a page, plots, a table and JSON."""
