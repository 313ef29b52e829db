"""Building blocks of fields."""
