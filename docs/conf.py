"""Sphinx configuration: builds without network and without warnings."""

from __future__ import annotations

import pkgutil
import re
from pathlib import Path
from typing import Any

import transformers

import dsf
from dsf.adapters._table import layer_rows, registry_folders
from dsf.report import systems_markdown

project = "dsf"
author = "the dsf contributors"
release = dsf.__version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.viewcode", "myst_nb"]
exclude_patterns = ["_build", "_generated"]
html_theme = "furo"
html_title = f"dsf {release}"
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_timeout = 120
nb_execution_raise_on_error = True
nb_merge_streams = True
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": False}
autodoc_mock_imports = ["triton"]
suppress_warnings = ["config.cache"]


def generate() -> None:
    """Lists from the code, so that new files appear: models, measures, layers of other libraries.

    The releases in the table of layers are those that constraints.txt pins for the tests.
    """
    folder = Path(__file__).parent / "_generated"
    folder.mkdir(exist_ok=True)
    for package in (dsf.models, dsf.measures):
        modules = [m.name for m in pkgutil.iter_modules(package.__path__) if m.name[0] != "_"]
        lines = [f".. automodule:: {package.__name__}.{name}" for name in modules]
        name = package.__name__.rpartition(".")[2]
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    pins = (Path(__file__).parent.parent / "constraints.txt").read_text(encoding="utf-8")
    tried = dict(re.findall(r"^(torch|transformers)==(\S+)", pins, re.MULTILINE))
    (folder / "layers.md").write_text(
        systems_markdown(layer_rows(tried)) + "\n", encoding="utf-8")  # fmt: skip
    folders = registry_folders(Path(transformers.__file__).parent / "models")
    names = ", ".join(f"`{name}`" for name in folders)
    (folder / "attention_interface.md").write_text(
        f"In transformers {transformers.__version__} these {len(folders)} folders have one: "
        f"{names}.\n", encoding="utf-8")  # fmt: skip


def as_rst(text: str) -> list[str]:
    """A docstring of this library as reStructuredText.

    Blocks indented by four are equations and become literal, headings underlined by dashes become
    bold, `name: what it is` lines under them a list; everything else is escaped text.
    """
    out: list[str] = []
    in_list = False
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        lines = block.split("\n")
        if all(line.startswith("    ") for line in lines):
            out += ["::", "", *lines, ""]
            continue
        if len(lines) > 1 and set(lines[1].strip()) == {"-"}:
            out += [f"**{escaped(lines[0])}**", ""]
            lines, in_list = lines[2:], True
        out += as_list(lines) if in_list else [escaped(line) for line in lines]
        out.append("")
        in_list = False
    return out


def as_list(lines: list[str]) -> list[str]:
    """One item for each line that is not indented."""
    return [
        f"  {escaped(line.strip())}" if line.startswith(" ") else f"- {escaped(line)}"
        for line in lines
    ]


def escaped(line: str) -> str:
    """Text whose only markup is `code`."""
    parts = re.split(r"(`[^`]+`)", line.strip() if not line.startswith("- ") else line)
    return "".join(
        f"``{part[1:-1]}``" if re.fullmatch(r"`[^`]+`", part)
        else re.sub(r"([\\*_|`<>])", r"\\\1", part)
        for part in parts
    )  # fmt: skip


def process_docstring(
    app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    lines[:] = as_rst("\n".join(lines))


def skip(app: Any, what: str, name: str, obj: Any, skipped: bool, options: Any) -> bool | None:
    """Fields of data classes are described in the class's own docstring."""
    return (
        True if what == "class" and not callable(obj) and not isinstance(obj, property) else None
    )


def setup(app: Any) -> None:
    generate()
    app.connect("autodoc-process-docstring", process_docstring)
    app.connect("autodoc-skip-member", skip)
