"""The standard tests, by what they are about; :mod:`q_core.testing.suite` gathers them.

Each is run for every op that a backend implements and that it applies to. Its docstring says what has to hold and how to mend a failure.
"""
