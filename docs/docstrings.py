"""A Sphinx extension for the docstrings of the package, which are closer to Markdown than to reStructuredText.

In them single backticks are code, a lone `*` is an asterisk, an indented paragraph is a formula or code, and a section
of one paragraph, such as `Collectives:`, begins on the line of its name.
"""

import re

import syncnorm

SECTIONS = ("Collectives", "Shapes", "Source")
LINKED = {
    *(f"syncnorm.{name}" for name in syncnorm.__all__ if name not in ("functional", "testing")),
    *(
        f"syncnorm.{module.__name__.rpartition('.')[2]}.{name}"
        for module in (syncnorm.functional, syncnorm.testing)
        for name in module.__all__
    ),
}


def convert(lines):
    """Return the lines of a docstring in reStructuredText, with the sections as napoleon knows them."""
    converted = []
    before = ""  # the last line that is not empty
    in_section = is_literal = False
    for above, line in zip(["", *lines], lines, strict=False):
        is_indented = line.startswith("    ")
        if not above and line:  # a paragraph begins
            in_section = False
            is_literal = is_indented and not before.startswith("    ") and not before.endswith(":")
            if is_literal:
                converted += ["::", ""]
        if match := re.match(rf"({'|'.join(SECTIONS)}): (.*)", line):
            converted.append(f"{match[1]}:")
            in_section, line = True, match[2]
        converted.append(("    " if in_section and line else "") + (line if is_literal else inline(line)))
        before = line or before
    return converted


def inline(text):
    """Return text with its code as literals or links, and with what is no markup escaped."""
    spans = re.split(r"`([^`]+)`", text)
    return "".join(code(span) if i % 2 else escape(span) for i, span in enumerate(spans))


def code(text):
    """Return the role or the literal for code."""
    return f":py:obj:`{text}`" if text in LINKED else f"``{text}``"


def escape(text):
    """Return text without code, in which only `*word*` is markup; a lone "C." is no item of a list."""
    text = re.sub(r"(?<=: )([A-Z])\.$", r"\1\\.", text)
    return re.sub(r"\*(\w+)\*|[*|]|(?<=\w)_(?!\w)", lambda match: match[0] if match[1] else f"\\{match[0]}", text)


def setup(app):
    """Convert each docstring before napoleon reads it."""
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("autodoc-process-docstring", _process, priority=100)
    return {"parallel_read_safe": True}


def _process(app, what, name, obj, options, lines):
    lines[:] = convert(lines)
