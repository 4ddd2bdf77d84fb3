"""Maple: from raw shop events to a watched, versioned, served recommender, on a laptop or a Ray cluster."""

__version__ = "0.1.0"
