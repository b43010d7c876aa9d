"""Empty databases."""

from databases import address, postgres

__all__ = ["address", "postgres"]
