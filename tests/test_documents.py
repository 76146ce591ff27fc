"""The pages in Markdown: their columns, their contents, and where their links lead."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOST_COLUMNS = 120
SKIPPED_FOLDERS = {".venv", ".venv-torchtpu", "build", "dist"}
SKIPPED_FOLDERS |= {".hypothesis", ".pytest_cache"}
DOCUMENTS = sorted(
    path.relative_to(ROOT)
    for path in ROOT.rglob("*.md")
    if not SKIPPED_FOLDERS & set(path.relative_to(ROOT).parts)
)
# Each ends with the comment that it begins with; commands write what is between.
GENERATED = re.compile(
    r"<!-- ((?:predicted|measured|compared) [^\n]*) -->\n.*?<!-- \1 -->", re.S
)
# Printed as one line, which a reader copies and .ci/run runs.
COMMAND = re.compile(
    r"<!-- (?:main|test|torchtpu test) command -->\n```bash\n.*?```", re.S
)
FENCED = re.compile(r"^ *```.*?^ *```", re.S | re.M)  # in a list they are indented
LINK = re.compile(r"!?\[(?:[^\]]*)\]\(([^)\s]+)\)")


def text_of(document: Path) -> str:
    return (ROOT / document).read_text("utf-8")


def prose_of(document: Path) -> str:
    """Returns the page without code."""
    return FENCED.sub("", text_of(document))


def anchors_of(document: Path) -> set[str]:
    """Returns what the headings of a page can be linked by."""
    headings = re.findall(r"^#+ (.*)", prose_of(document), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def test_all_the_pages_are_found():
    assert {Path("README.md"), Path("torch_rpa/serving/README.md")} <= set(DOCUMENTS)


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_lines_fit_120_columns(document):
    text = GENERATED.sub("", COMMAND.sub("", text_of(document)))
    is_log = document.name == "EXPERIMENTS.md"  # its tables are long, its prose is not
    long = [
        line
        for line in text.splitlines()
        if len(line) > MOST_COLUMNS and not (is_log and line.startswith("|"))
    ]
    assert long == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_links_lead_to_files_and_headings(document):
    broken = []
    for target in LINK.findall(prose_of(document)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (ROOT / document.parent / path).resolve() if path else ROOT / document
        if not linked.exists():
            broken.append(target)
        elif anchor and anchor not in anchors_of(linked.relative_to(ROOT)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize(
    "document",
    [d for d in DOCUMENTS if d.name == "README.md" and "## Contents" in text_of(d)],
    ids=str,
)
def test_the_contents_name_every_section_in_order(document):
    prose = prose_of(document)
    contents = prose.split("## Contents\n")[1].split("\n## ")[0].split("<!--")[0]
    linked = re.findall(r"\(#([^)]*)\)", contents)
    sections = re.findall(r"^## (.*)", prose.split("## Contents\n")[1], re.M)
    expected = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in sections]
    assert [anchor for anchor in linked if anchor in expected] == expected


def test_long_pages_have_contents():
    long = {"README.md", "benchmarks/README.md", "jax_kernels/README.md"}
    long |= {f"torch_rpa/{name}/README.md" for name in ("serving", "transformers")}
    assert [d for d in sorted(long) if "## Contents" not in text_of(Path(d))] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_modules_that_a_page_names_exist(document):
    kernel = ROOT / "jax_kernels" / "ragged_paged_attention"
    folders = ROOT, ROOT / document.parent, ROOT / "jax_kernels", kernel
    named = re.findall(r"`([\w.]+/[\w/.]+\.(?:py|json|sh))`", prose_of(document))
    missing = [
        path
        for path in named
        if not any((folder / path).is_file() for folder in folders)
        and not (kernel / path.removeprefix("rpa/")).is_file()
    ]
    assert missing == []
