"""Puts README, CHANGELOG, reports and examples into the site, so that links to them hold there as in the repository."""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
ADDED = ("README.md", "CHANGELOG.md", "reports/**/*.*", "examples/**/*.*")


def on_files(files: Files, *, config: Any) -> Files:
    """Add the files; what a folder's README is called in the repository, its index is in the site."""
    for path in sorted(path for pattern in ADDED for path in ROOT.glob(pattern)):
        if path.is_file() and path.suffix not in (".db", ".pyc"):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """The pages of docs/ stand at the top of the site, beside the repository's own files."""
    own = (Path(str(page.file.abs_src_path)).parent) == ROOT / "docs"
    return markdown.replace("](../", "](") if own else markdown.replace("](docs/", "](")
