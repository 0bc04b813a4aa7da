"""Evaluation: scores with standard errors, image grids, and a report in one HTML file."""
