"""The site has the repository's layout, so that every link works here as on GitHub.

README.md is the home page, docs/ lies at the root, what a page links to comes along,
and each entry `api/MODULE.md` of the navigation is that module's docstrings.
"""

import ast
import pathlib
import posixpath
import re
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = pathlib.Path(__file__).parent.parent.parent
LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Replaces the files of docs/ by those of the repository that the site shows."""
    theme = [file for file in files if file.src_dir != config.docs_dir]
    api = {path for path in titles(config.nav) if path.startswith("api/")}
    pages = {
        path for path in titles(config.nav).keys() - api if (ROOT / path).is_file()
    }
    pages |= {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}
    shown = [made_of_docstrings(path, config) for path in sorted(api)]
    shown += [of_repository(path, config) for path in sorted(with_links(pages))]
    return Files([*theme, *shown])


def on_page_markdown(
    markdown: str, *, page: Page, config: MkDocsConfig, files: Files
) -> str:
    """Names links by titles: `[sharpness.md](sharpness.md)` reads [Sharpness]."""
    del files
    folder, named = posixpath.dirname(page.file.src_uri), titles(config.nav)

    def name(match: re.Match) -> str:
        path = posixpath.normpath(posixpath.join(folder, match[1]))
        return (
            f"[{named[path]}]({match[1]}{match[2] or ''})"
            if path in named
            else match[0]
        )

    return re.sub(r"\[[\w./]+\.md\]\(([^)#]+)(#[^)]*)?\)", name, markdown)


def titles(nav: Any) -> dict[str, str]:
    """Returns the pages of the navigation, by path, with their titles."""
    if isinstance(nav, list):
        return {path: title for part in nav for path, title in titles(part).items()}
    ((title, value),) = nav.items()
    return {value: title} if isinstance(value, str) else titles(value)


def with_links(pages: set[str]) -> set[str]:
    """Returns pages, the style sheet and what pages link to, and so on."""
    found, waiting = {"docs/site/extra.css"}, set(pages)
    while waiting:
        page = waiting.pop()
        found.add(page)
        if page.endswith(".md"):
            folder = posixpath.dirname(page)
            links = LINK.findall((ROOT / page).read_text())
            paths = {posixpath.normpath(posixpath.join(folder, x)) for x in links}
            waiting |= {x for x in paths - found if (ROOT / x).is_file()}
    return found


def of_repository(path: str, config: MkDocsConfig) -> File:
    """Returns a file at its own place; scripts as text, which browsers show."""
    file = File.generated(config, path, abs_src_path=str(ROOT / path))
    if path.endswith(".md"):
        file.dest_uri = file.dest_uri.removeprefix("docs/")
    elif path.endswith((".py", ".sh")):
        file.dest_uri += ".txt"
    return file


def made_of_docstrings(path: str, config: MkDocsConfig) -> File:
    """Returns the page of a module: its docstring, then all of its public names.

    Each is named where it is defined: `samrobust.attacks.pgd` is a module, too.
    """
    module = path.removeprefix("api/").removesuffix(".md")
    source = ROOT / module.replace(".", "/")
    source = source / "__init__.py" if source.is_dir() else source.with_suffix(".py")
    homes, names = {}, []
    for node in ast.parse(source.read_text()).body:
        if isinstance(node, ast.ImportFrom):
            homes |= {alias.name: node.module for alias in node.names}
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets) == "__all__":
            names = ast.literal_eval(node.value)
    content = f"# `{module}`\n\n::: {module}\n"
    content += "    options: {members: false, show_root_toc_entry: false}\n\n"
    for name in names:
        if not name.isupper():  # constants have no docstrings
            content += f"::: {homes.get(name, module)}.{name}\n"
            content += "    options: {show_root_heading: true}\n\n"
    return File.generated(config, path, content=content)
