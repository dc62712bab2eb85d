"""JSON that another process wrote, parsed only where that takes some milliseconds.

``json.loads`` holds all threads of the process while it parses: 16 MiB of ``[[],[],…`` take seconds, on a loop or in a
thread. A large object is taken apart in steps instead, by its members, without a look into them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator
from typing import Any, Final

MAX_VALUES: Final = 20_000
"""Commas, colons and brackets of a text that is parsed, outside its strings."""
MAX_ESCAPES: Final = 200_000
"""Backslashes of a text that is parsed: each costs time in a string."""
MAX_LIST: Final = 1 << 20
"""Bytes of a list that is parsed at once."""
MAX_NAME: Final = 1000
"""Bytes of a member's name."""
_SIGNS: Final = b",:[{"
_ALL_BUT_SIGNS: Final = bytes(sorted(set(range(256)) - set(_SIGNS)))
_ALL_BUT_MARKS: Final = bytes(sorted(set(range(256)) - set(_SIGNS + b'"')))
_ALL_BUT_BRACKETS: Final = bytes(sorted(set(range(256)) - set(b"[]{}")))
# JSON has no NaN and no infinity; some kernels write them.
_WITHOUT_NAN: Final = json.JSONDecoder(parse_constant=lambda _name: None)
# Bytes that are searched at once: some tenths of a millisecond. Of a step, units of 256 bytes or one find.
_SEARCHED: Final = 64 << 10
_STEP: Final = 3000
# Bytes of a string that are decoded at once.
_DECODED: Final = 256 << 10
_BRACKET: Final = re.compile(rb"[][{}]")
_SPACE: Final = re.compile(rb"[ \t\r\n]*")
_BACKSLASH: Final = ord("\\")
_PLAIN: Final = re.compile(rb"[-+.\w]{1,400}")


def load_json(
    data: bytes | bytearray | memoryview | str, limit: int, *, values: int = MAX_VALUES, nan: bool = True
) -> Any:
    """Parse at most ``limit`` bytes with at most ``values`` values. Raises ValueError, also for what nests too deep.

    Without ``nan`` what is no number is None.
    """
    if len(data) > limit:
        raise ValueError(f"JSON of {len(data)} bytes, and the limit is {limit}")
    text = data if isinstance(data, str) else bytes(data)
    if len(text) > values:
        _check(text.encode(errors="replace") if isinstance(text, str) else text, values)
    try:
        if nan:
            return json.loads(text)
        return _WITHOUT_NAN.decode(text.decode() if isinstance(text, bytes) else text)
    except RecursionError:
        raise ValueError("JSON that nests too deep") from None


def _check(text: bytes, values: int) -> None:
    """Raise ValueError for more than ``values`` values, or too many escapes."""
    if text.count(b"\\") > MAX_ESCAPES:
        raise ValueError(f"JSON of more than {MAX_ESCAPES} escapes")
    found = len(text.translate(None, _ALL_BUT_SIGNS))
    if found > values:
        # Those in strings do not count: every second piece between the quotes is a string.
        marks = text.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _ALL_BUT_MARKS)
        if marks.count(b'"') <= 4 * values:
            found = sum(map(len, marks.split(b'"')[::2]))
    if found > values:
        raise ValueError(f"JSON of {found} values, and the limit is {values}")


# -- large objects, in steps ----------------------------------------------------------------------------


def split_object(text: bytes) -> Generator[None, None, dict[str, bytes]]:
    """The members of a JSON object, each as its text. Raises ValueError where it is none.

    Each step takes about a millisecond. What is inside of a member is not checked.
    """
    members: dict[str, bytes] = {}
    at = _after_space(text, 0)
    if text[at : at + 1] != b"{":
        raise ValueError("no JSON object")
    at = _after_space(text, at + 1)
    is_empty = text[at : at + 1] == b"}"
    while not is_empty:
        if text[at : at + 1] != b'"':
            raise ValueError("a member without a name")
        end = yield from _string_end(text, at + 1)
        if end - at > MAX_NAME:
            raise ValueError("a member's name that is too long")
        name = str(json.loads(text[at:end]))
        at = _after_space(text, end)
        if text[at : at + 1] != b":":
            raise ValueError("a name without a value")
        at = _after_space(text, at + 1)
        end = yield from _value_end(text, at)
        if len(members) >= MAX_VALUES:
            raise ValueError("too many members")
        members[name] = text[at:end]
        at = _after_space(text, end)
        sign = text[at : at + 1]
        if sign == b"}":
            break
        if sign != b",":
            raise ValueError("a member without an end")
        at = _after_space(text, at + 1)
        yield
    if _after_space(text, at + 1) != len(text):
        raise ValueError("more than one value")
    return members


def _after_space(text: bytes, at: int) -> int:
    found = _SPACE.match(text, at, at + _SEARCHED)
    return found.end() if found else at


def _value_end(text: bytes, at: int) -> Generator[None, None, int]:
    first = text[at : at + 1]
    if first == b'"':
        return (yield from _string_end(text, at + 1))
    if first in (b"{", b"["):
        return (yield from _container_end(text, at + 1))
    found = _PLAIN.match(text, at)
    if found is None:
        raise ValueError("a member without a value")
    return found.end()


def _string_end(text: bytes, at: int) -> Generator[None, None, int]:
    """The place behind the closing quote of a string that has begun before ``at``."""
    begin, work = at, 0
    while at < len(text):
        found = text.find(b'"', at, at + _SEARCHED)
        end = found if found >= 0 else min(at + _SEARCHED, len(text))
        if found >= 0:
            # An even number of backslashes before it: it closes. Mostly there is one, or none.
            if found == begin or text[found - 1] != _BACKSLASH:
                return found + 1
            if found - 1 > begin and text[found - 2] == _BACKSLASH:
                run = yield from _run_before(text, begin, found)
                if run % 2 == 0:
                    return found + 1
            begin = found
        work += 1 + (end - at) // 256
        at = end + (found >= 0)
        if work > _STEP:
            work = 0
            yield
    raise ValueError("a string without an end")


def _run_before(text: bytes, begin: int, at: int) -> Generator[None, None, int]:
    """The number of backslashes before a place, none before ``begin``."""
    count = 0
    while at > begin and text[at - 1] == _BACKSLASH:
        piece = text[max(begin, at - _SEARCHED) : at]
        run = len(piece) - len(piece.rstrip(b"\\"))
        count, at = count + run, at - run
        if run < len(piece):
            break
        yield
    return count


def _container_end(text: bytes, at: int) -> Generator[None, None, int]:
    """The place behind the bracket that closes the one before ``at``."""
    depth, work = 1, 0
    while at < len(text):
        end = min(at + _SEARCHED // 4, len(text))
        quote = text.find(b'"', at, end)
        end = end if quote < 0 else quote
        work += 4 + (end - at) // 16
        signs = text[at:end].translate(None, _ALL_BUT_BRACKETS)
        for _ in range(3):  # most pairs are near each other
            signs = signs.replace(b"[]", b"").replace(b"{}", b"")
        if _closes(signs, depth):
            return _closing(text, at, end, depth)
        closing = signs.count(b"]") + signs.count(b"}")
        depth += len(signs) - 2 * closing
        at = end
        if quote >= 0:
            at = yield from _string_end(text, quote + 1)
        if work > _STEP:
            work = 0
            yield
    raise ValueError("a list or an object without an end")


def _closes(signs: bytes, depth: int) -> bool:
    """Whether brackets of this depth are all closed somewhere in here."""
    if signs.count(b"]") + signs.count(b"}") < depth:
        return False
    for sign in signs:
        depth += 1 if sign in b"[{" else -1
        if not depth:
            return True
    return False


def _closing(text: bytes, at: int, end: int, depth: int) -> int:
    """The place behind the bracket with which all are closed."""
    for found in _BRACKET.finditer(text, at, end):
        depth += 1 if found[0] in b"[{" else -1
        if not depth:
            return found.end()
    raise ValueError("brackets that are not in pairs")


def loading(data: bytes, limit: int, *, whole: int, lenient: int = 2) -> Generator[None, None, Any]:
    """``load_json`` in steps, without NaN: of more than ``whole`` bytes, objects and strings are taken apart.

    In so many ``lenient`` levels of objects a member that cannot be parsed in time is left out. Raises ValueError.
    """
    if len(data) > limit:
        raise ValueError(f"JSON of {len(data)} bytes, and the limit is {limit}")
    if len(data) <= whole:
        return load_json(data, whole, values=whole, nan=False)
    if data[:1] == b'"':
        return (yield from _decoding(data[1:-1]))
    if data[:1] != b"{" or lenient < -1:
        return load_json(data, MAX_LIST, nan=False)
    members = yield from split_object(data)
    loaded: dict[str, Any] = {}
    for name, text in members.items():
        try:
            loaded[name] = yield from loading(text, limit, whole=whole, lenient=lenient - 1)
        except ValueError:
            if lenient < 1:
                raise
        yield
    return loaded


def _decoding(text: bytes) -> Generator[None, None, str]:
    """A string's text, without its quotes, decoded piece by piece."""
    pieces, at = [], 0
    while at < len(text):
        end = _cut(text, at, at + _DECODED) if at + _DECODED < len(text) else len(text)
        pieces.append(json.loads(b'"%b"' % text[at:end]))
        at = end
        yield
    return "".join(pieces)


def _cut(text: bytes, begin: int, at: int) -> int:
    """A place at or shortly before ``at``, behind ``begin``, where no character and no escape is cut."""
    for _ in range(3):
        if text[at] & 0xC0 == 0x80:  # inside a character
            at -= 1
    last = text.rfind(b"\\", at - 12, at)
    if last < 0:
        return at
    before = text[begin : last + 1]
    run = len(before) - len(before.rstrip(b"\\"))
    if run % 2 == 0:
        return at
    # The escape that begins here, and the first half of a pair before it.
    is_second = re.match(rb"(?i)\\ud[89ab]..\\ud[c-f]", text[max(begin, last - 6) : last + 4])
    return last - 6 if is_second else last
