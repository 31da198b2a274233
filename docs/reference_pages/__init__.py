"""The pages of the site that nobody writes: from op records, docstrings, ``environment.py`` modules, ``--help`` and READMEs."""

from reference_pages.site import Page, Site

__all__ = ["Page", "Site"]
