"""The q backend for CPUs.

Nothing to call here: install the distribution and use :mod:`q_core.ops`, or anything above it. :mod:`q_cpu.plugin` is what q-core finds,
:mod:`q_cpu.quantize`, :mod:`q_cpu.gemm`, :mod:`q_cpu.optim`, :mod:`q_cpu.attention` and :mod:`q_cpu.norm` implement the ops,
:mod:`q_cpu.runtime` sets the native module up.
"""
