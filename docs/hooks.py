"""What mkdocs runs besides its own: adds the reference pages and the distributions' READMEs, and leads links to them.

A link on a page is written so that it holds where the file is viewed in the repository: to ``../packages/q-core/README.md``, or to the
source of an op. On the site it leads to the page that was made of that file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

from reference_pages import Site

_site = Site(Path(__file__).parents[1])


def on_config(config: Any) -> Any:
    """Put the added pages into the navigation."""
    config.nav.extend(_site.navigation())
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages."""
    for uri, page in _site.pages.items():
        files.append(File.generated(config, uri, content=page.text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Lead links out of the documentation to the site's own pages."""
    return _site.with_site_links(markdown, page.file.src_uri)
