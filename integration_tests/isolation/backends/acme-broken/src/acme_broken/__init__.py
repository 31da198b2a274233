"""A backend whose library is missing."""
