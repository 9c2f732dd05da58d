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
METHODS = ["samrobust.sharpness"]
METHODS += [
    f"samrobust.training.{part}" for part in ("adversaries", "objectives", "averaging")
]
LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")
TITLE = re.compile(r"\[(?P<text>[\w./]+\.md)\]\((?P<path>[^)#]+)(?P<anchor>[^)]*)\)")


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
    """Names links by titles, and links the rows of methods to their docstrings."""
    del files
    folder, named = posixpath.dirname(page.file.src_uri), titles(config.nav)
    homes = {
        name: home for module in METHODS for name, home in public_names(module).items()
    }

    def titled(match: re.Match) -> str:
        path = posixpath.normpath(posixpath.join(folder, match["path"]))
        return f"[{named.get(path, match['text'])}]({match['path']}{match['anchor']})"

    def linked(match: re.Match) -> str:
        name = match[1].rpartition("+")[2].partition(",")[0]
        return f"| [`{match[1]}`][{homes[name]}] |" if name in homes else match[0]

    markdown = re.sub(r"^\| `([^`]*)` \|", linked, markdown, flags=re.MULTILINE)
    return re.sub(TITLE, titled, markdown)


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
    """Returns the page of a module: its docstring, then all of its public names."""
    module = path.removeprefix("api/").removesuffix(".md")
    content = f"# `{module}`\n\n::: {module}\n"
    content += "    options: {members: false, show_root_toc_entry: false}\n\n"
    for home in public_names(module).values():
        content += f"::: {home}\n    options: {{show_root_heading: true}}\n\n"
    return File.generated(config, path, content=content)


def public_names(module: str) -> dict[str, str]:
    """Returns the public names of a module, each with the place of its definition.

    Not `samrobust.attacks.pgd`, which is a module, too, but
    `samrobust.attacks.pgd.pgd`. Names in rows of tables are public. Constants have no
    docstrings and are left out.
    """
    source = ROOT / module.replace(".", "/")
    source = source / "__init__.py" if source.is_dir() else source.with_suffix(".py")
    homes, names, rows = {}, [], {}
    for node in ast.parse(source.read_text()).body:
        if isinstance(node, ast.ImportFrom):
            homes |= {alias.name: node.module for alias in node.names}
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets) == "__all__":
            names = ast.literal_eval(node.value)
        elif isinstance(node, ast.Assign) and ":ENTRY" in ast.unparse(node.value):
            rows = ast.literal_eval(node.value)
    found = {name: f"{homes.get(name, module)}.{name}" for name in names}
    found |= {name: entry.replace("ENTRY", name) for name, entry in rows.items()}
    return {k: v.replace(":", ".") for k, v in found.items() if not k.isupper()}
