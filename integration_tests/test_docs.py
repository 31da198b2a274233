"""The documentation's links hold where it is viewed in the repository, and its generated pages leave nothing out."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from q_core import Availability, Backend, ops
from q_core.formats.codebooks import FOUR_BIT_BOOKS
from q_core.specs import RECORDS
from q_core.testing import Capabilities, suite
from reference_pages import Site, command, environment, operations
from reference_pages.docstrings import to_markdown

ROOT = Path(__file__).parents[1]
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)")
HEADING = re.compile(r"^#+ (.*)", re.MULTILINE)
PAGES = [
    page
    for pattern in ("*.md", "*/q-*/README.md", "integration_tests/third_party/*/README.md", "docs/**/*.md")
    for page in sorted(ROOT.glob(pattern))
]


def links(markdown: str) -> list[str]:
    return [target for target in LINK.findall(FENCED.sub("", markdown)) if "://" not in target]


@pytest.fixture(scope="module")
def site() -> Site:
    return Site(ROOT)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_of_the_repository(page: Path) -> None:
    broken = [target for target in links(page.read_text()) if not (page.parent / target).exists()]
    assert not broken


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/**/*.md")), ids=lambda page: page.name)
def test_on_the_site_they_lead_to_its_pages_and_pictures(page: Path, site: Site) -> None:
    uri = page.relative_to(ROOT / "docs").as_posix()
    files = (path for path in ROOT.glob("docs/**/*") if path.suffix in (".md", ".png"))
    known = {path.relative_to(ROOT / "docs").as_posix() for path in files} | set(site.pages)
    for target in links(site.with_site_links(page.read_text(), uri)):
        assert (Path("/site") / uri).parent.joinpath(target).resolve().relative_to("/site").as_posix() in known


def test_links_in_code_and_to_elsewhere_stay(site: Site) -> None:
    stays = "[a](https://example.org) [b](#below) [c](how-to/write-a-backend.md)\n\n```python\nx[0](../CONTRIBUTING.md)\n```\n"
    assert site.with_site_links(stays, "index.md") == stays
    moved = site.with_site_links("[d](../packages/q-core/README.md#the-surface)", "index.md")
    assert moved == "[d](distributions/q-core.md#the-surface)"
    assert site.with_site_links("[e](../../CONTRIBUTING.md)", "how-to/write-a-backend.md") == "[e](../contributing.md)"


@pytest.mark.parametrize("op", RECORDS)
def test_an_op_has_a_page_with_all_of_its_contract(op: str, site: Site) -> None:
    record, page = RECORDS[op], site.pages[f"reference/ops/{op}.md"].text
    assert record.summary in page.replace("`", "``") or record.summary.replace("``", "`") in page
    for argument in record.arguments:
        assert f"`{argument}`" in page, f"{argument} is missing"
    for mutated in record.mutates:
        assert re.search(rf"^\| Mutates \|.*`{mutated}`", page, re.MULTILINE)
    for neutral, value in record.neutral.items():
        assert re.search(rf"^\| May be left out \|.*`{neutral}` \({re.escape(repr(value))}\)", page, re.MULTILINE)
    assert ("exact, bit for bit" in page) == (record.bound is None)
    assert ":func:" not in page and "``" not in page.replace("```", "")
    headings = HEADING.findall(FENCED.sub("", page))
    assert headings[0] == op and {"Contract", "Arguments", "For a backend"} <= set(headings)


@pytest.mark.parametrize("op", RECORDS)
def test_an_ops_page_has_a_table_of_its_tensors(op: str) -> None:
    record, page = RECORDS[op], operations.page(op)
    for row in (*record.argument_rows(), *record.result_rows()):
        formats = f" ({row.formats})" if row.formats else ""
        start, axes = re.escape(f"| `{row.tensor}{row.place}`{formats} | "), re.escape(f" | `{row.operand.axes_text}` |")
        line = re.search(f"^{start}.*{axes}.*$", page, re.MULTILINE)
        assert line is not None and row.operand.dtype_text in line[0], row
        assert (" | yes | " in line[0]) == row.mutated and ("| at " in line[0]) == (row.neutral is not None)


def test_axes_are_those_of_the_legend() -> None:
    letters = operations.letters()
    assert letters["T"] == "tokens" and letters["G"] == "kv heads" and letters["S"] == "slots of a block"
    assert "| Axes | T tokens, N out features, K in features |" in operations.page("gemm_4bit")


def test_the_index_lists_every_op_and_the_tolerances() -> None:
    index = operations.index()
    assert all(f"[`{op}`]({op}.md)" in index for op in ops.__all__)
    assert "## Tolerances" in index and "| FACTOR |" in index


def test_every_environment_variable_that_is_read_is_described() -> None:
    modules = environment.modules(ROOT)
    assert {module.parent.name for module in modules} >= {"q_core", "q_cpu", "q_serve"}
    for module in modules:
        described = {variable.name for variable in environment.described_in(module)}
        assert described == environment.read_in(module), module
        assert all(f"`{name}`" in environment.page(ROOT) for name in described)


def test_code_books_are_those_of_the_formats() -> None:
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", operations.index().partition("## Code books")[2], re.MULTILINE)
    assert [int(code) for code, _ in rows] == list(range(16))
    columns = zip(*(map(float, values.split(" | ")) for _, values in rows), strict=True)
    for (name, book), values in zip(FOUR_BIT_BOOKS.items(), columns, strict=True):
        printed, held = (torch.tensor(v, dtype=torch.float32) for v in (values, book.values))
        assert torch.equal(printed, held), name


def test_a_backends_parts_and_the_suites_tests_are_described(site: Site) -> None:
    page = site.pages["reference/backend.md"].text
    for field in (*dataclasses.fields(Backend), *dataclasses.fields(Availability)):
        assert f"- `{field.name}`: " in page, f"{field.name} is missing"
    assert "- `accepts`: " in page and "BackendConflictError(BackendError)" in page
    page = site.pages["reference/conformance.md"].text
    for field in dataclasses.fields(Capabilities):
        assert f"- `{field.name}`: " in page, f"{field.name} is missing"
    for test in (name for name in suite.__all__ if name.startswith("test_")):
        assert re.search(rf"^### {test}\n\n.+?\n\nMend: ", page, re.MULTILINE | re.DOTALL), f"{test} is missing, or how to mend it"


def test_every_subcommand_is_on_its_page() -> None:
    assert {"doctor", "ops", "explain", "conformance", "bench", "new-backend"} <= set(command.commands())
    page = command.page()
    assert all(f"## {name}\n" in page and f"usage: q-core {name}" in page for name in command.commands())


def test_docstrings_become_markdown() -> None:
    docstring = """Do it (arXiv 2305.14314).

As :func:`q_core.ops.gemm` does, with ``x``.

Args:
    x, y: float32 [T, K],
        any strides.
    scale: a factor.

Returns:
    Tensor [T]: of any dtype.
"""
    assert to_markdown(docstring, lambda target: "gemm.md" if target == "q_core.ops.gemm" else None) == (
        "Do it ([arXiv 2305.14314](https://arxiv.org/abs/2305.14314)).\n\nAs [`gemm`](gemm.md) does, with `x`.\n\n"
        "## Arguments\n\n- `x`, `y`: float32 [T, K], any strides.\n- `scale`: a factor.\n\n"
        "## Returns\n\nTensor [T]: of any dtype."
    )
