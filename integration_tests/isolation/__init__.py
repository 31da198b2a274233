"""Fresh environments with no backend, with two, with a broken one and with one for a newer surface: a model runs end to end in each.

``nox -s isolation`` builds the wheels and runs ``python -m isolation WHEEL…``.
"""
