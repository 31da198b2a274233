"""The kernels themselves: functions under ``triton.jit``, which know pointers, sizes and strides only.

Arithmetic is in float32; other dtypes exist at a load, a dot and a store. Nothing is of one vendor: no inline
assembly, no library of theirs.
What is bit for bit the reference's is launched with ``exact=True``, and divides with ``tl.div_rn``.
"""
