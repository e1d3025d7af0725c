"""Gemma 3, compressed once and served fast. README, "How it works", draws the way from a recipe to an answer."""
