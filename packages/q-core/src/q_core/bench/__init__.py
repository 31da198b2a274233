"""What the dispatch itself costs: ``q-core bench``."""
