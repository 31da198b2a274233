"""Sample calls of each op: they feed opcheck, the comparison with the reference, ``explain`` and benchmarks."""
