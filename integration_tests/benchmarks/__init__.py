"""Every op beside its peers, and beside what the hardware allows, in one run: ``nox -s bench``."""
