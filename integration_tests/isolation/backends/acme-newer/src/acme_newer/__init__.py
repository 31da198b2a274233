"""A backend of tomorrow."""
