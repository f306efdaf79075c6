"""Clean documents instead of dropping them: control characters, markup left-overs, boilerplate lines, white space.

Each cleaning is an option and is counted by itself. Mathematics and code are left alone: only HTML's own tags go (not
``a < b``), indentation stays, and nothing is lower-cased.

Boilerplate has two sides. Lines that match a pattern of `lines` go. And lines of at most `line_length` characters that
stand in `repeated_in` or more documents of one source go: menus, cookie notices and footers, in any language. For that
the documents are read twice; an 8-byte digest and a count of each different short line are kept meanwhile.
"""

from __future__ import annotations

import hashlib
import html
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from ....base.errors import ConfigError
from ....config.fields import Int, Section, Words
from ..base import Context, Document, Documents
from ..ledger import Ledger
from ..texts import changed_record, text_of

EMPTIED = "nothing but noise"
_CONTROL = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff\ufffe\uffff\u2060\u00ad\ufff9-\ufffb]"
)
_BREAKS = (
    "article aside blockquote body br center dd div dl dt figure footer form h1 h2 h3 h4 h5 h6 head header hr html"
    " iframe li link main meta nav ol option p pre script section select style table tbody td textarea tfoot th thead"
    " title tr ul video"
)
_INLINE = "a abbr b button caption code em font i img input label small span strong sub sup u"
_TAG = re.compile(
    rf"</?(?:(?P<breaks>{'|'.join(_BREAKS.split())})|{'|'.join(_INLINE.split())})(?:\s[^<>]*)?/?>",
    re.IGNORECASE,
)
_HIDDEN = re.compile(r"<(script|style)\b[^<>]*>.*?</\1\s*>|<!--.*?-->", re.IGNORECASE | re.DOTALL)
_ENTITY = re.compile(r"&(?:[a-zA-Z][a-zA-Z0-9]{1,20}|#\d{1,7}|#x[0-9a-fA-F]{1,6});")
_SPACES = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f]")
_ENDS = re.compile(r"[ \t]+$", re.MULTILINE)
_BLANK = re.compile(r"\n{3,}")


class Options(Section):
    """What is cleaned."""

    unicode: bool = True  # the composed form NFC
    control_characters: bool = True
    markup: bool = True  # tags, comments, scripts, entities
    lines: Words = Field(default_factory=list)  # regular expressions of whole lines that go, case ignored
    repeated_in: Annotated[Int, Field(ge=0)] = 0  # documents of a source; 0: repetition says nothing
    line_length: Annotated[Int, Field(ge=1)] = 200
    whitespace: bool = True  # odd spaces, ends of lines, more than two line breaks in a row


Cleaning = Callable[[str], str]


class Denoise:
    """Rewrites documents; drops those of which nothing is left."""

    section: ClassVar[type[Section]] = Options
    changes: ClassVar[bool] = True
    last: ClassVar[bool] = False

    def __init__(self, options: Options, context: Context) -> None:
        self.options = options
        if options.repeated_in == 1:
            fix = "Name at least 2 documents, or 0 to keep repeated lines."
            raise ConfigError("repeated_in is 1: every line would go.", where=context.where, fix=fix)
        self._patterns = []
        for pattern in options.lines:
            try:
                self._patterns.append(re.compile(pattern, re.IGNORECASE))
            except re.error as error:
                fix = "Correct it; a backslash in front of a sign takes it literally."
                raise ConfigError(
                    f"{pattern!r} is no regular expression: {error}.", where=context.where, fix=fix
                ) from None

    def reads(self) -> Sequence[Path]:
        """Nothing but the documents."""
        return ()

    def run(self, documents: Documents, ledger: Ledger) -> None:
        """Find repeated lines, then clean every document."""
        repeated = self._repeated(documents)
        ledger.expect([EMPTIED])
        ledger.expect((name for name, _ in self._cleanings(set())), changes=True)
        for document in documents:
            self._clean(document, repeated.get(document.source, set()), ledger)

    def _clean(self, document: Document, repeated: set[bytes], ledger: Ledger) -> None:
        record, changes = document.record, {}
        for name, cleaning in self._cleanings(repeated):
            cleaned = changed_record(record, cleaning)
            if cleaned != record:
                changes[name] = len(text_of(record)) - len(text_of(cleaned))
            record = cleaned
        if not text_of(record).strip():
            ledger.drop(document, EMPTIED)
        else:
            ledger.write(document, record, changes)

    def _cleanings(self, repeated: set[bytes]) -> Iterator[tuple[str, Cleaning]]:
        options = self.options
        if options.unicode:
            yield "unicode form", lambda text: unicodedata.normalize("NFC", text)
        if options.markup:
            yield "markup", without_markup
        if options.control_characters:
            yield (
                "control characters",
                lambda text: _CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n")),
            )
        if self._patterns:
            yield "boilerplate lines", lambda text: _without(text, self._matches)
        if options.repeated_in:
            yield "repeated lines", lambda text: _without(text, lambda line: _digest(line) in repeated)
        if options.whitespace:
            yield "white space", tidy

    def _matches(self, line: str) -> bool:
        return any(pattern.fullmatch(line.strip()) for pattern in self._patterns)

    def _repeated(self, documents: Documents) -> dict[int, set[bytes]]:
        """Return, for each source, the digests of the lines that too many of its documents share."""
        if not self.options.repeated_in:
            return {}
        counts: dict[int, Counter[bytes]] = {}
        before = [cleaning for name, cleaning in self._cleanings(set()) if name not in _LATE]
        for document in documents:
            record = document.record
            for cleaning in before:
                record = changed_record(record, cleaning)
            lines = {line.strip() for line in text_of(record).splitlines()}
            short = (line for line in lines if 0 < len(line) <= self.options.line_length)
            counts.setdefault(document.source, Counter()).update(_digest(line) for line in short)
        least = self.options.repeated_in
        return {source: {line for line, n in found.items() if n >= least} for source, found in counts.items()}


_LATE = ("boilerplate lines", "repeated lines", "white space")


def without_markup(text: str) -> str:
    """Remove HTML's tags, comments and scripts, and write out entities; tags between paragraphs break the line.

    >>> without_markup("if <b>a</b> < b &amp;&amp; b > c<br/>then")
    'if a < b && b > c\\nthen'
    """
    text = _TAG.sub(lambda tag: "\n" if tag["breaks"] else "", _HIDDEN.sub("", text))
    return _ENTITY.sub(lambda found: html.unescape(found.group()), text)


def tidy(text: str) -> str:
    """Make odd spaces plain, cut the ends of lines, keep at most one blank line; indentation stays."""
    return _BLANK.sub("\n\n", _ENDS.sub("", _SPACES.sub(" ", text))).strip("\n").rstrip()


def _digest(line: str) -> bytes:
    return hashlib.blake2b(line.strip().encode(), digest_size=8).digest()


def _without(text: str, unwanted: Callable[[str], bool]) -> str:
    lines = text.split("\n")
    kept = [line for line in lines if not line.strip() or not unwanted(line)]
    return text if len(kept) == len(lines) else "\n".join(kept)


STAGE = Denoise
