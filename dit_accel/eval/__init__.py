"""Measuring what acceleration costs in quality."""
