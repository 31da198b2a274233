"""What is shown on a machine with a GPU, in one command and without a network: ``python -m gpu``, or ``nox -s gpu``.

The tests beside this are marked ``gpu``, so that a run without one leaves them out. Where Triton's interpreter plays the GPU
(``TRITON_INTERPRET=1``, ``Q_TRITON_TARGET=sm_90``), those that need none of its streams and graphs run on the CPU, at small sizes.
"""
