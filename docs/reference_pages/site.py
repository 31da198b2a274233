"""Which pages are added to the site, of which files they are made, and links between the two."""

from __future__ import annotations

import os
import posixpath
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from reference_pages import command, environment, operations, python

_FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<=\]\()(?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?(?=\))")
_DISTRIBUTIONS = ("*/q-*/README.md", "integration_tests/third_party/*/README.md")


@dataclass(frozen=True, slots=True)
class Page:
    """A page that is added.

    Attributes:
        title: in the navigation.
        text: Markdown.
        sources: files and folders of the repository that it stands for; links to one of them lead to the page, and its own links are
            relative to the first.
    """

    title: str
    text: str
    sources: tuple[str, ...] = ()


class Site:
    """The added pages of a repository.

    Args:
        root: folder of the repository.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    @cached_property
    def pages(self) -> dict[str, Page]:
        """By their place on the site."""
        return self._reference() | self._distributions()

    def navigation(self) -> list[dict[str, object]]:
        """The pages in mkdocs' form of a navigation."""
        ops = [{"Ops": ["reference/ops/index.md", *(f"reference/ops/{op}.md" for op in operations.names())]}]
        others = [{page.title: uri} for uri, page in self._reference().items() if not uri.startswith("reference/ops/")]
        return [
            {"Reference": ["reference/rules.md", *ops, *others]},
            {"Distributions": [{page.title: uri} for uri, page in self._distributions().items()]},
        ]

    def _reference(self) -> dict[str, Page]:
        core = "packages/q-core/src/q_core"
        on_index = ("ops", "ops/__init__.py", "specs/bounds.py", "formats/codebooks.py")
        index = Page("Ops", operations.index(), tuple(f"{core}/{source}" for source in on_index))
        pages = {"reference/ops/index.md": index}
        pages |= {f"reference/ops/{op}.md": Page(op, operations.page(op)) for op in operations.names()}
        modules = tuple(path.relative_to(self._root).as_posix() for path in environment.modules(self._root))
        pages["reference/backend.md"] = Page("What a backend is made of", python.backend_page(), (f"{core}/backend.py",))
        suite = (f"{core}/testing/suite.py", f"{core}/testing")
        pages["reference/conformance.md"] = Page("The conformance suite", python.conformance_page(), suite)
        formats = (f"{core}/formats", f"{core}/formats/quantized_tensor.py", f"{core}/formats/checkpoint.py")
        pages["reference/quantized-weights.md"] = Page("Quantized weights", python.quantized_weights_page(), formats)
        pages["reference/command.md"] = Page("The q-core command", command.page(), (f"{core}/cli", f"{core}/cli.py"))
        pages["reference/environment.md"] = Page("Environment variables", environment.page(self._root), modules)
        return pages

    def _distributions(self) -> dict[str, Page]:
        pages = {}
        readmes = [readme for pattern in _DISTRIBUTIONS for readme in self._root.glob(pattern)]
        for readme in sorted(readmes, key=lambda path: path.parent.name):
            folder = readme.parent.relative_to(self._root).as_posix()
            pages[f"distributions/{readme.parent.name}.md"] = Page(
                readme.parent.name, readme.read_text(encoding="utf-8"), (f"{folder}/README.md", folder)
            )
        contributing = (self._root / "CONTRIBUTING.md").read_text(encoding="utf-8")
        return pages | {"contributing.md": Page("Contributing", contributing, ("CONTRIBUTING.md",))}

    @cached_property
    def _page_of(self) -> dict[str, str]:
        """Places on the site by file or folder of the repository."""
        return {source: uri for uri, page in self.pages.items() for source in page.sources}

    def with_site_links(self, markdown: str, uri: str) -> str:
        """A page's text with links that lead to the site's pages.

        Args:
            markdown: the page as it is in the repository.
            uri: its place on the site.

        Returns:
            The text. A link to what is not on the site stays, so that mkdocs warns of it.
        """
        added = self.pages.get(uri)
        if added and not added.sources:
            return markdown
        home = added.sources[0] if added else f"docs/{uri}"

        def site_link(match: re.Match[str]) -> str:
            target, anchor = match["target"], match["anchor"] or ""
            if "://" in target or target.startswith("mailto:"):
                return match[0]
            file = posixpath.normpath(posixpath.join(posixpath.dirname(home), target))
            there = self._page_of.get(file) or file.removeprefix("docs/")
            if there == file:
                return match[0]
            return posixpath.relpath(there, posixpath.dirname(uri) or ".").replace(os.sep, "/") + anchor

        # What looks like a link in code is none.
        return "".join(part if part.startswith("```") else _LINK.sub(site_link, part) for part in _FENCED.split(markdown))
