"""What `make docs` adds to docs/: README, CHANGELOG, CONTRIBUTING, the reference, the notebooks."""

from __future__ import annotations

import base64
import importlib
import inspect
import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]

# Of each page of the reference: its title, and the package whose `__all__` it shows.
REFERENCE = {
    "operators": ("Operators", "engram_kernels"),
    "editing": ("Editing", "engram_kernels.editing"),
    "tracing": ("Tracing", "engram_kernels.tracing"),
    "evaluation": ("Evaluation", "engram_kernels.evaluation"),
    "grafting": ("Grafting", "engram_kernels.grafting"),
    "memory": ("Memory", "engram_kernels.memory"),
    "larimar": ("Larimar", "engram_kernels.larimar"),
    "layers": ("Layers", "engram_kernels.layers"),
    "integrations": ("Integrations", "engram_kernels.integrations"),
}
# Families of operators, in the order in which they are shown.
FAMILIES = {
    "low_rank": "The associative write",
    "second_moment": "Statistics",
    "graft": "Grafting",
    "graft_masks": "Masks",
    "graft_sparse": "Sparse writes",
    "graft_diff": "Sparse differences",
    "memory": "Episodic memory",
    "memory_inverse": "Addresses",
    "memory_streaming": "Streaming memory",
    "ridge": "Ridge memory",
    "linear_memory": "Other linear memories",
}
# Files that are pages of the site, though they lie elsewhere.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "CODE_OF_CONDUCT.md": "conduct.md",
    "SECURITY.md": "security.md",
}


def on_files(files: Files, config) -> Files:
    """Add the pages that are made here."""
    made = {page: (ROOT / source).read_text("utf-8") for source, page in PAGES.items()}
    made["index.md"] = f"---\nhide: [navigation]\n---\n{made['index.md']}"
    made |= {f"reference/{name}.md": reference(*of) for name, of in REFERENCE.items()}
    made["reference/commands.md"] = commands()
    made |= {
        f"notebooks/{path.stem}.md": notebook(path)
        for path in sorted((ROOT / "docs/notebooks").glob("*.ipynb"))
    }
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    """Let links to files of the repository lead to pages of the site; what is no page keeps its name only.

    Fences lose what tests read in them: why a block is not executed.
    """
    markdown = re.sub(r'^( *```\w+) skip=".*"$', r"\1", markdown, flags=re.MULTILINE)
    source = next((ROOT / name for name, made in PAGES.items() if made == page.file.src_uri), None)
    folder = (source or ROOT / "docs" / page.file.src_uri).parent

    def link(found: re.Match) -> str:
        text, target, anchor = found[1], found[2], found[3] or ""
        path = (folder / target).resolve()
        if not path.exists() or not path.is_relative_to(ROOT):
            return found[0]
        name = path.relative_to(ROOT).as_posix()
        uri = PAGES.get(name, name.removeprefix("docs/"))
        if files.get_file_from_path(uri) is None:
            return text
        up = "../" * page.file.src_uri.count("/")
        return f"[{text}]({up}{uri}{anchor})"

    return re.sub(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!\w+:|#)([^)\s#]+)(#[^)\s]*)?\)", link, markdown)


def reference(title: str, package: str) -> str:
    """A page with every public name of a package; of the operators by family."""
    module = importlib.import_module(package)
    lines = [f"# {title}", "", f"`{package}`", ""]
    # Classes, functions, and constants last.
    names = sorted(
        module.__all__, key=lambda name: (not inspect.isclass(getattr(module, name)), name.isupper())
    )
    if package == "engram_kernels":
        lines += ["`import engram_kernels as ek`. How they fit together: [operators](../operators.md).", ""]
        families = {
            of.__name__.rpartition(".")[2]: of for of in vars(module.ops).values() if inspect.ismodule(of)
        }
        for name in sorted(families, key=[*FAMILIES, *families].index):
            own = [one for one in getattr(families[name], "__all__", ()) if one in names]
            if own:
                title = FAMILIES.get(name, name.replace("_", " ").capitalize())
                lines += [f"## {title}", "", *entries(package, own)]
                names = [one for one in names if one not in own]
        lines += ["## Covariances, backends, errors", ""]
    return "\n".join([*lines, *entries(package, names)])


def entries(package: str, names: list[str]) -> list[str]:
    return [line for name in names for line in (f"::: {package}.{name}", "")]


def commands() -> str:
    """The help of every command, as a terminal of 80 columns shows it."""
    import typer

    from engram_kernels.cli import app

    def pages(command, name: str) -> list[str]:
        context = command.make_context(name, [], resilient_parsing=True, terminal_width=80)
        help_ = command.get_help(context).rstrip()
        found = [f"{'#' * (1 + name.count(' '))} {name}", "", "```text", help_, "```", ""]
        for sub, one in getattr(command, "commands", {}).items():
            found += pages(one, f"{name} {sub}")
        return found

    return "\n".join(["---", "title: Commands", "---", *pages(typer.main.get_command(app), "engram")])


def notebook(path: Path) -> str:
    """A notebook as a page, with the outputs that it was saved with; its pictures lie in the page itself."""
    import nbformat
    from nbconvert import MarkdownExporter

    body, resources = MarkdownExporter().from_notebook_node(nbformat.read(path, as_version=4))
    for name, content in resources["outputs"].items():
        body = body.replace(f"({name})", f"(data:image/png;base64,{base64.b64encode(content).decode()})")
    return body
