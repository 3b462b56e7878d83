# SPDX-License-Identifier: Apache-2.0
"""Documents of three domains (code, maths, prose) for the demo's base model, split into training and held-out.

Code is the functions of the Python standard library, normalised by ``ast.unparse`` (no comments, one line of
docstring), split by file. Maths is ``maths_problems``. Prose is JSONL with ``text`` (and optional ``split``), text files
whose documents end in ``<|endoftext|>``, or a hub data set with a ``text`` column.
"""

from __future__ import annotations

import ast
import itertools
import json
import sysconfig
import textwrap
import zlib
from collections.abc import Iterator
from pathlib import Path

from maths_problems import problems

SKIP = {"test", "tests", "idlelib", "site-packages", "__pycache__", "lib2to3", "turtledemo", "encodings", "pydoc_data"}
DOCUMENT_END = "<|endoftext|>"


def python_files(root: Path) -> list[Path]:
    return sorted(p for p in root.rglob("*.py") if not SKIP.intersection(p.relative_to(root).parts))


def functions(source: str) -> Iterator[str]:
    """Every function and method of a module, outermost only, unparsed, with at most one line of docstring."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop(0)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                doc = ast.get_docstring(child)
                if doc is not None:
                    first = doc.strip().split("\n")[0][:100]
                    child.body[0] = ast.Expr(ast.Constant(first))
                    if not first:
                        child.body = child.body[1:] or [ast.Pass()]
                text = ast.unparse(ast.fix_missing_locations(child))
                if 80 <= len(text) <= 4000:
                    yield text
            else:
                stack.append(child)


def code(root: Path, held_out: bool) -> list[str]:
    """Functions of the files under ``root``; one file in twenty is held out, by hash of its path."""
    documents = []
    for path in python_files(root):
        name = path.relative_to(root).as_posix()
        if (zlib.crc32(name.encode()) % 20 == 0) == held_out:
            documents += functions(path.read_text("utf-8", errors="ignore"))
    return documents


def unwrap(text: str) -> str:
    """Joins the lines of a hard-wrapped text (longest line under 90 characters) into paragraphs."""
    lines = text.split("\n")
    if len(lines) < 8 or max(map(len, lines)) >= 90:
        return text
    joined = [lines[0]]
    for before, line in itertools.pairwise(lines):
        if len(before) > 45 and line.strip():
            joined[-1] += " " + line
        else:
            joined.append(line)
    return "\n".join(joined)


def clean(text: str) -> str:
    """Straight quotes, single spaces, one line a paragraph."""
    for a, b in (("“", '"'), ("”", '"'), ("’", "'"), ("‘", "'"), ("—", "--"), ("\r", "")):
        text = text.replace(a, b)
    return "\n".join(" ".join(line.split()) for line in unwrap(text).split("\n") if line.strip())


def prose(source: str, held_out: bool) -> list[str]:
    """Documents of a JSONL file, a text file or a hub data set; ``split`` other than ``train`` is held out."""
    path = Path(source)
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        return [clean(r["text"]) for r in rows if (r.get("split", "train") != "train") == held_out]
    if path.exists():
        documents = [clean(t) for t in path.read_text("utf-8").split(DOCUMENT_END)]
        return [t for t in documents if len(t) > 100 and (zlib.crc32(t.encode()) % 50 == 0) == held_out]
    from datasets import load_dataset

    rows = load_dataset(source, split="train")["text"]
    return [clean(t) for t in rows if (zlib.crc32(t.encode()) % 50 == 0) == held_out]


def paragraphs(text: str, size: int) -> Iterator[str]:
    """A long document in pieces of about ``size`` characters that begin at a line."""
    piece: list[str] = []
    for line in text.split("\n"):
        piece.append(line)
        if sum(map(len, piece)) >= size:
            yield "\n".join(piece)
            piece = []
    if sum(map(len, piece)) > 200:
        yield "\n".join(piece)


def documents(prose_sources: list[str], code_root: str | None, num_maths: int, held_out: bool) -> dict[str, list[str]]:
    """Every document of one side of the split, by domain."""
    root = Path(code_root or sysconfig.get_paths()["stdlib"])
    maths = itertools.islice(problems(1 if held_out else 0, held_out), num_maths)
    return {
        "code": code(root, held_out),
        "maths": [q + a for q, a in maths],
        "prose": [p for s in prose_sources for t in prose(s, held_out) for p in paragraphs(t, 1500)],
    }


if __name__ == "__main__":
    import sys

    for side in (False, True):
        for domain, texts in documents(sys.argv[1:], None, 1000, side).items():
            print("held out" if side else "train", domain, len(texts), sum(map(len, texts)))
            print(textwrap.indent(texts[len(texts) // 3][:600], "    "))
