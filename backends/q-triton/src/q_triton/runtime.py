"""Whether Triton works in this process."""

from __future__ import annotations

import importlib
import importlib.util

from q_core.backend import Availability


def availability() -> Availability:
    """Tell whether Triton can be imported here, and which version.

    Triton is imported by the call, not before: it costs time and loads a shared library.

    Returns:
        The version of Triton as the reason, or why it can't be imported. Whether a GPU is there to run its kernels is for
        the backends' probes to say.
    """
    if importlib.util.find_spec("triton") is None:
        advice = "torch's builds for GPUs bring it along; to interpret kernels on a CPU, pip install 'q-triton[interpreter]'"
        return Availability(False, f"Triton is not installed: {advice}")
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        return Availability(False, f"Triton is installed but can't be imported: {error}")
    return Availability(True, f"Triton {triton.__version__}")
