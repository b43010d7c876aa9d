"""Experiments on what the toolkit does, each a function that returns its results and one that writes them down."""
