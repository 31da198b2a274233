"""Faults planted one at a time in the third-party backend: the conformance suite must catch each (``nox -s mutants``)."""
