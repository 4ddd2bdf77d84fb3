"""Words of a text in any language: normalised, case folded, one token per word, and per character where words have no spaces."""

from __future__ import annotations

import re
import unicodedata

#: Scripts written without spaces between words: Han, Hiragana, Katakana, Thai, Lao, Khmer, Myanmar. A character is a token.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_TOKEN = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")

#: More of a text than this is not read: a description of megabytes says no more, and costs as much as the whole catalogue.
MAX_CHARACTERS = 20_000


def normal(text: str) -> str:
    """NFKC, case folded, at most ``MAX_CHARACTERS``."""
    return unicodedata.normalize("NFKC", text[:MAX_CHARACTERS]).casefold()


def tokens(text: str) -> list[str]:
    """The tokens of a text in order: words of letters, digits and marks; single characters of scripts without spaces."""
    return _TOKEN.findall(normal(text))
