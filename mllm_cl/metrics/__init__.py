"""Scores of answers, and what follows from their matrix; imports nothing else of the package."""
