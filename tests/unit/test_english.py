"""Plain English: words and turns that make a reader stop are in no page, docstring, comment or message."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# What to write instead is the subject that acts: "the server", "the launcher", "the user".
WORDS = {
    r"\banew\b": "again",
    r"\bof before\b": "earlier",
    r"\b(is|are|was|were|be|been|being) told\b": "name the actor and what it does",
    r"\b(let|lets|letting) go of\b": "drop, detach, hand over",
    r"\b(see|sees|saw|seen|seeing) to\b": "name the act",
    r"\b(is|are|was|were) to be\b": "must be, will be",
    r"\bfor ever\b": "indefinitely, without a limit",
    r"\bwhoever\b": "the reader, the caller, the owner",
    r"\bwhomever\b": "name the person",
    r"\bas whom\b": "as which user",
    r"\bwhose (it|the|they|this|that|these|those) \w+ (is|are|was)\b": "which user owns",
    r"\bwhose (it|they|this|that) (is|are|was)\b": "which user owns",
    r"\bnobody(?!@)\b": "no user, no server, no caller",
    r"\beverybody\b": "all users, every user",
    r"\bsomebody\b": "a user, another process",
    r"\bwho (comes|asks|reads|waits|has|does) \w+ (is|must|may|can|gets)\b": "the client, the reader",
}
PATTERN = re.compile("|".join(f"(?:{pattern})" for pattern in WORDS), re.IGNORECASE)
# The Unix user of that name.
NOT_PROSE = re.compile(r"""["'`]nobody["'`]|\bnobody(?=[:@/])""")


def python_prose(path: Path) -> list[tuple[int, str]]:
    """The comments and the strings of a Python file, with their lines."""
    text = path.read_text()
    found = [
        (token.start[0], token.string)
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT
    ]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value != "nobody":  # the Unix user
            found.append((node.lineno, node.value))
    return found


def prose(path: Path) -> list[tuple[int, str]]:
    """What a person reads in a file, with its lines; code in fences is left out of a page."""
    if path.suffix == ".py":
        return python_prose(path)
    text = path.read_text()
    if path.suffix == ".md":
        text = re.sub(r"^```.*?^```", lambda block: "\n" * block[0].count("\n"), text, flags=re.DOTALL | re.MULTILINE)
    return list(enumerate(text.splitlines(), 1))


def written(*places: str) -> list[Path]:
    """All files below these places that people read."""
    found = []
    for place in places:
        path = ROOT / place
        files = [path] if path.is_file() else sorted(path.rglob("*"))
        found += [each for each in files if each.is_file() and "__pycache__" not in each.parts]
    return [each for each in found if each.suffix in {".py", ".md", ".conf", ".service", ".sh", ".yaml", ""}]


FILES = written(
    *("gateway_slurm", "launchers", "docs", "etc", "kernelspecs", "scripts", "bench", "tests"),
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md"),
)
FILES.remove(Path(__file__))  # it lists the words


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_page_and_a_docstring_are_in_plain_english(path: Path) -> None:
    """The failure names the line, the words, and what to write instead."""
    name = str(path.relative_to(ROOT))
    wrong = []
    for line, text in prose(path):
        for match in PATTERN.finditer(NOT_PROSE.sub("", " ".join(text.split()))):
            instead = next(hint for pattern, hint in WORDS.items() if re.fullmatch(pattern, match[0], re.IGNORECASE))
            wrong.append(f"{name}:{line}: {match[0]!r}: {instead}")
    assert wrong == []
