"""The q backend for CPUs.

Nothing to call here: install the distribution and use :mod:`q_core.ops`, or anything above it. :mod:`q_cpu.plugin` is what q-core finds,
the modules of the op families implement them, :mod:`q_cpu.runtime` sets the native module up.
"""
