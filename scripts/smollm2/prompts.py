# SPDX-License-Identifier: Apache-2.0
"""Prompts for the shipped SmolLM2 adapter: maths, code and chat in random order, a conversation a line.

    python scripts/smollm2/prompts.py --maths train.jsonl --code codegen-instruct.json \
        --chat roleplay.json seed_tasks.jsonl --output prompts.jsonl

The files, from public repositories:
  --maths  openai/grade-school-math, grade_school_math/data/train.jsonl (MIT)
  --code   teknium1/GPTeacher, Codegen/codegen-instruct.json (MIT)
  --chat   teknium1/GPTeacher, Roleplay/roleplay-simple-deduped-roleplay-instruct.json (MIT);
           yizhongw/self-instruct, data/seed_tasks.jsonl (Apache-2.0)
Functions to complete are taken from the standard library of the Python that runs this (PSF licence).
"""

import argparse
import ast
import json
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

COMPLETE = "Complete the following Python function. Answer with the whole function.\n\n```python\n{}\n```"
MAX_CHARACTERS = 900


def main() -> None:
    """Write the prompts that the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maths", type=Path, nargs="*", default=[])
    parser.add_argument("--code", type=Path, nargs="*", default=[])
    parser.add_argument("--chat", type=Path, nargs="*", default=[])
    parser.add_argument("--per_domain", type=int, default=1000, help="at most this many prompts of each domain")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()

    generator = random.Random(args.seed)
    domains = {
        "maths": [text for path in args.maths for text in instructions(path)],
        "code": [text for path in args.code for text in instructions(path)],
        "complete": list(functions_to_complete()) if args.code else [],
        "chat": [text for path in args.chat for text in instructions(path)],
    }
    rows = []
    for domain, texts in domains.items():
        texts = sorted({text for text in texts if len(text) <= MAX_CHARACTERS})
        share = args.per_domain // 2 if domain in ("code", "complete") else args.per_domain
        for text in generator.sample(texts, min(share, len(texts))):
            rows.append({"domain": domain, "messages": [{"role": "user", "content": text}]})
    generator.shuffle(rows)  # a run of `mtp distill` that is cut short is then a fair sample
    with args.output.open("w", encoding="utf-8") as file:
        for number, row in enumerate(rows):
            file.write(json.dumps({"id": number, **row}, ensure_ascii=False) + "\n")
    print(", ".join(f"{domain} {sum(row['domain'] == domain for row in rows)}" for domain in domains))


def instructions(path: Path) -> Iterator[str]:
    """The questions or instructions of a .json list or a .jsonl file, with their inputs."""
    text = path.read_text(encoding="utf-8")
    rows = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines() if line]
    for row in rows:
        instance = row.get("instances", [{}])[0]
        context = row.get("input") or instance.get("input") or ""
        yield (row.get("question") or row["instruction"]) + (f"\n\n{context}" if context else "")


def functions_to_complete() -> Iterator[str]:
    """Signatures with docstrings of the standard library's functions: the form of HumanEval's prompts."""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="replace"))):
            docstring = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
            if docstring and not node.name.startswith("_") and len(docstring) > 60:
                arguments = ast.unparse(node.args)
                if "self" not in arguments:
                    body = "\n".join(f"    {line}".rstrip() for line in docstring.splitlines())
                    yield COMPLETE.format(f'def {node.name}({arguments}):\n    """\n{body}\n    """')


if __name__ == "__main__":
    main()
