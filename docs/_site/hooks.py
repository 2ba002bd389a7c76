"""Hooks of MkDocs: links that leave docs/, tables of other folders as pages, and Sphinx's roles in docstrings."""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
OUTSIDE = {"configs/README.md": "configs.md", "benchmarks/README.md": "benchmarks.md", "README.md": "index.md"}
"""Pages outside docs/ and where they are on the site."""
LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\])\(([^)\s]+)\)")
CELL, CODE = re.compile(r"<td.*?</td>", re.DOTALL), re.compile(r"(?<=<code>)[^<]+")
SEPARATOR = re.compile(r"([._/=](?=\w))")
PICTURE = re.compile(r'(<img\b[^>]*\bsrc="([^"]+)"[^>]*>)')
ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):<code>(~?)([^<]*)</code>")


def on_config(config: Any) -> Any:
    """Take the address of the repository from that of its clone, as Read the Docs gives it."""
    config.repo_url = config.repo_url.removesuffix(".git")
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the tables that stand beside configurations and benchmarks."""
    for source, page in OUTSIDE.items():
        if page != "index.md":
            files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Let every link lead to a page of the site, else to the repository; without an address of it the text stays."""
    origin = {site: source for source, site in OUTSIDE.items() if site != "index.md"}
    folder = posixpath.dirname(origin.get(page.file.src_uri, f"docs/{page.file.src_uri}"))
    here = posixpath.dirname(page.file.src_uri)

    def moved(match: re.Match[str]) -> str:
        text, link = match.groups()
        target, _, anchor = link.partition("#")
        if not target or "://" in target or target.startswith("mailto:"):
            return match[0]
        path = posixpath.normpath(posixpath.join(folder, target))
        known = OUTSIDE.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
        if known is not None and here != "notebooks":  # whose pages link the files themselves
            known = re.sub(r"\.ipynb$", ".md", known)
        if known is not None:
            relative = posixpath.relpath(known, here or ".")
            return f"{text}({relative}{f'#{anchor}' if anchor else ''})"
        return f"{text}({config.repo_url.rstrip('/')}/blob/main/{path})" if config.repo_url else text[1:-1]

    parts = re.split(r"(^```.*?^```)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else LINK.sub(moved, part) for part in parts)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Show a name where a docstring has Sphinx's role for it, let names in tables break, and open pictures at full size."""
    html = ROLE.sub(lambda match: f"<code>{match[2].rpartition('.')[2] if match[1] else match[2]}</code>", html)
    html = CELL.sub(lambda cell: CODE.sub(lambda code: SEPARATOR.sub(r"\1<wbr>", code[0]), cell[0]), html)
    return PICTURE.sub(r'<a href="\2">\1</a>', html)
