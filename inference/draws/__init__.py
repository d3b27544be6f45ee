"""A model or guide run for many posterior draws."""
