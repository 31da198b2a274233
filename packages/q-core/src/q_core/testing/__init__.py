"""Tools to test an implementation of the surface (extra ``q-core[testing]``)."""

from q_core.testing.agreement import Disagreement, disagreements
from q_core.testing.fakes import family_module, installed_backends

__all__ = ["Disagreement", "disagreements", "family_module", "installed_backends"]
