"""Tools to test an implementation of the surface (extra ``q-core[testing]``).

The conformance suite is :mod:`q_core.testing.suite`; a backend's test file imports everything from it.
"""

from q_core.testing.agreement import Disagreement, disagreements, disagreements_of
from q_core.testing.capabilities import Capabilities
from q_core.testing.fakes import family_module, installed_backends

__all__ = ["Capabilities", "Disagreement", "disagreements", "disagreements_of", "family_module", "installed_backends"]
