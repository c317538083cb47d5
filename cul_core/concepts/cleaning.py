"""Cleaning of names and captions as users type, paste or save them: one place for all of them."""

from __future__ import annotations

import codecs
import re
import unicodedata
from pathlib import Path

from ..base.errors import ConceptError, brief_repr

BREAKS = "\u200b\u2060\ufeff"
"""Zero-width spaces and joiners of words, and the byte order mark that some files begin with."""
_INVISIBLE = re.compile("[\u00ad\u034f\u061c\u180e\u200e\u200f\u2061-\u2064\u206a-\u206f\ufff9-\ufffb]")
"""Characters that show nothing and change no word: soft hyphens, marks of direction, and the like."""
_TAGS = re.compile("(?<![\U0001f3f4\U000e0020-\U000e007f])[\U000e0000-\U000e007f]+")
"""Tags outside of the flags that are made of them."""
_BLANKS = re.compile("[\u115f\u1160\u2800\u3164\uffa0]")
"""Letters that look like a space."""
_JOINERS = "\u200c\u200d"
"""They belong into words of some scripts and into emoji, where both neighbours are outside Latin."""
_SELECTORS = re.compile("(?<![^\x00-\xff])(?<![#*0-9\u00a9\u00ae])[\ufe00-\ufe0f\U000e0100-\U000e01ef]")
"""Variation selectors behind nothing that has variants."""
_SYNTAX = {
    r"\(.*:\s*[+-]?(\d+\.?\d*|\.\d+)\s*\)": "a weight",
    r"\(\s*\(|\)\s*\)": "an emphasis",
    r"(?i)\bembedding:\S": "an embedding",
    r"<[A-Za-z]\w*:[^<>]*>": "a LoRA or another network",
    r"\{[^{}]*\|[^{}]*\}": "a choice of words",
}
"""Pattern -> what it is in the syntax of prompts."""


def clean_text(what: str, text: str) -> str:
    r"""A name or caption as the host's encoder reads it, composed (NFC), without characters that nobody sees.

    Parentheses escaped as in prompts (`saber \(fate\)`) become plain ones.

    Args:
        what: what the text is, for errors.
        text: as it was typed or read.

    Raises:
        ConceptError: it holds a zero-width space within a word, or a part of the syntax of prompts.
    """
    text = _BLANKS.sub(" ", _TAGS.sub("", _INVISIBLE.sub("", unicodedata.normalize("NFC", text))))
    text = _SELECTORS.sub("", _without_joiners(text))
    if hidden := re.search(rf"(?<=[^\s{BREAKS}])[{BREAKS}]+(?=[^\s{BREAKS}])", text):
        raise ConceptError(
            f"The {what} {brief_repr(text)} holds the invisible character {hidden[0][0]!a} within a word; "
            "type it anew."
        )
    text = re.sub(f"[{BREAKS}]", "", text)
    text = text.replace(r"\(", "(").replace(r"\)", ")")
    kind = next((kind for pattern, kind in _SYNTAX.items() if re.search(pattern, text)), None)
    if kind or _is_wrapped(text.strip()):
        raise ConceptError(
            f"The {what} {brief_repr(text)} holds {kind or 'an emphasis'} in the syntax of prompts; give "
            "only the words."
        )
    return text


def _without_joiners(text: str) -> str:
    def stays(place: int) -> bool:
        around = text[place - 1 : place] + text[place + 1 : place + 2]
        return len(around) == 2 and all(ord(letter) > 0xFF and not letter.isspace() for letter in around)

    return "".join(c for place, c in enumerate(text) if c not in _JOINERS or stays(place))


def _is_wrapped(text: str) -> bool:
    """Whether one pair of parentheses encloses all of a text with letters: an emphasis, and no name."""
    if not (text.startswith("(") and text.endswith(")") and any(map(str.isalpha, text))):
        return False
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return place == len(text) - 1
    return False


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 with a byte order mark, as Notepad saves it.

    Raises:
        OSError, UnicodeError: the file cannot be read.
    """
    data = path.read_bytes()
    is_wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return data.decode("utf-16" if is_wide else "utf-8-sig")
