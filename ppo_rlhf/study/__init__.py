"""Experiments on what the toolkit does: each returns its results, and makes a page of them."""
