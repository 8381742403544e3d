"""Wikitext to prose, as far as a page can be read without its templates.

One pass over the tokens of a page, with a stack of what is open: the time is proportional to the length of the page,
whatever it holds. The kept parsers were measured (docs/measurements.md): each takes minutes for some page of 100 kB.

What a reader sees as running text stays: texts of links, bold, italic, lists. Templates, tables, references, galleries,
code, formulas, pictures with their captions, categories, links to other languages, comments and magic words go.
What is never closed hides nothing, as in MediaWiki.
"""

import functools
import html
import re
from collections import Counter
from typing import NamedTuple

# Every search for an end is bounded (a link's target has no line break and 255 bytes) or stops at the next token.
_TOKEN = re.compile(
    r"""
    (?P<comment><!--)
    |(?P<tag><(?P<end>/?)(?P<name>[a-zA-Z][a-zA-Z0-9]*)(?=[\s/>])[^<>]*>)
    |(?P<open_braces>\{{2,})
    |(?P<close_braces>\}{2,})
    |(?P<open_table>\n[ \t:*#;]*\{\|[^\n]*)
    |(?P<close_table>\n[ \t:*#;]*\|\}(?!\}(?!\})))
    |(?P<lone_link>\n[ \t]*\[\[[^][{}|<>\n:]{1,255}:[^][{}<>\n]{1,510}\]\][ \t]*(?=\n))
    |(?P<paragraph>\n(?=[ \t]*\n))
    |(?P<open_link>\[\[(?:(?P<target>[^][{}|<>\n]{0,255})(?P<stop>\]\]|\|))?)
    |(?P<close_link>\]\])
    |(?P<open_url>\[(?:(?:https?|ftps?|sftp|ircs?|news|mailto|tel|gopher|git|svn):|//)[^][<>"\s]*[ \t]*)
    |(?P<close_url>\])
    |(?P<magic_word>__(?P<word>[^\W\d_]+(?:_[^\W\d_]+)*)__)
    """,
    re.VERBOSE,
)
_HIDING_TAGS = frozenset(
    "categorytree ce chem code dynamicpagelist gallery graph hiero imagemap includeonly inputbox mapframe maplink math "
    "pagelist pre ref references rss score script source style syntaxhighlight templatedata timeline".split()
)
_BLOCK_TAGS = frozenset(
    "blockquote caption center dd div dl dt h1 h2 h3 h4 h5 h6 hr li ol p poem table tbody td tfoot th thead tr "
    "ul".split()
)
_TAGS = (_HIDING_TAGS | _BLOCK_TAGS).union(
    "a abbr b bdi bdo big br cite data del dfn em embed font i img indicator ins kbd langconvert link mark meta "
    "noinclude nowiki onlyinclude phonos q rb rp rt rtc ruby s samp section small span strike strong sub sup "
    "templatestyles time translate tt tvar u var wbr".split()
)
_MEDIA = (
    r"(?!\s*media:)[^:|\n]{1,40}:[^|\n]{1,255}"  # [[Media:A.ogg|listen]] is a link that shows its text
    r"\.(?:jpe?g|png|gif|svg|tiff?|webp|xcf|pdf|djvu|og[agv]|opus|webm|mp[34]|midi?|wav|flac)"
)
_MEDIA_TARGET = re.compile(rf"{_MEDIA}\s*", re.IGNORECASE)
_GALLERY_LINE = re.compile(rf"{_MEDIA}(?:\||$)", re.IGNORECASE)
_HIDDEN_TARGET = re.compile(r"\s*(?:file|image|category)\s*:", re.IGNORECASE)
_LANGUAGE_TARGET = re.compile(r"\s*(?:[a-z]{2,3}(?:-[a-z]+)*|simple):")
_VARIANTS = re.compile(r"-\{(?:(?P<flags>[^{}|]{0,20})\|)?(?P<text>[^{}]*)\}-")
_VARIANT_NAME = re.compile(r"\s*[a-z]{2,3}(?:-[a-z]+)*\s*:\s*")
_LIST_MARKS = re.compile(r"(?:[*#:;]+|-{4,})\s*")
_QUOTES = re.compile(r"'{2,}")
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z][a-zA-Z0-9]{1,31});")


class _Open(NamedTuple):
    """What is open, and how many pieces of prose there were before it."""

    kind: str
    start: int
    target: str = ""


def prose_lines(wikitext: str) -> list[str]:
    """Returns the lines of a page's prose, without marks of lists; headings keep their equals signs."""
    text = _VARIANTS.sub(_first_variant, wikitext) if "-{" in wikitext else wikitext
    page = _Page(f"\n{text}\n")
    lines = page.prose().removeprefix("\n").removesuffix("\n").split("\n")
    # Of what was never closed: rows of a table, parameters of a template, lines of a gallery.
    rows = ("|", "!") if page.in_table else "|"
    return [
        _plain(line)
        for line in map(str.strip, lines)
        if not line.startswith(rows) and not (":" in line and _GALLERY_LINE.match(line))
    ]


class _Page:
    """One pass over a page. What turns out to be no prose is deleted again from the pieces, each piece once."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._pieces: list[str] = []
        self._open: list[_Open] = []
        self._counts: Counter[str] = Counter()
        self._never_closed: set[str] = set()
        """Tags whose end was sought in vain: it is not sought again, which keeps the time linear."""
        self._url_at: int | None = None

    @property
    def in_table(self) -> bool:
        """Tells whether a table is open."""
        return self._counts["{|"] > 0

    def prose(self) -> str:
        """Returns the text without its markup, but with marks of lists, quote marks and entities."""
        position = 0
        while token := _TOKEN.search(self._text, position):
            self._pieces.append(self._text[position : token.start()])
            position = getattr(self, f"_{token.lastgroup}")(token)
        self._pieces.append(self._text[position:])
        return "".join(self._pieces)

    # Each of the following reads the token it is named after, and returns where to go on.

    def _comment(self, token: re.Match) -> int:
        end = -1 if "!--" in self._never_closed else self._text.find("-->", token.end())
        if end >= 0:
            return end + 3
        self._never_closed.add("!--")
        end = self._text.find("\n\n", token.end())
        return end if end >= 0 else len(self._text)

    def _tag(self, token: re.Match) -> int:
        name, ends, closed = token["name"].lower(), bool(token["end"]), token[0].endswith("/>")
        if name not in _TAGS or "\n\n" in token[0]:
            self._pieces.append("<")
            return token.start() + 1
        if name in _HIDING_TAGS or name == "nowiki":
            return token.end() if ends or closed else self._hidden(name, token.end())
        self._pieces.append("\n" if name in _BLOCK_TAGS else " " if name == "br" else "")
        if name == "table" and ends:
            self._drop("<table>")
        elif name == "table":
            self._begin("<table>")
        return token.end()

    def _hidden(self, name: str, start: int) -> int:
        """Returns where the tag ends. One that begins once more before its end was never closed."""
        if name in self._never_closed:
            return start
        found = _next_tag(name).search(self._text, start)
        if found is None:
            self._never_closed.add(name)
        if found is None or not found["end"]:
            return start
        if name == "nowiki":
            literal = self._text[start : found.start()]
            self._pieces.append(re.sub(r"[^\w\s&#;]", lambda sign: f"&#{ord(sign[0])};", literal))
        return found.end()

    def _open_braces(self, token: re.Match) -> int:
        twos, odd = divmod(len(token[0]), 2)
        for _ in range(twos - odd):
            self._begin("{{")
        if odd:
            self._begin("{{{")
        return token.end()

    def _close_braces(self, token: re.Match) -> int:
        count = len(token[0])
        while count >= 2 and (closed := self._drop("{{", "{{{")):
            count -= min(count, len(closed.kind))
        return token.end()

    def _open_table(self, token: re.Match) -> int:
        self._pieces.append("\n")
        self._begin("{|")
        return token.end()

    def _close_table(self, token: re.Match) -> int:
        self._drop("{|")
        self._pieces.append("\n")
        return token.end()

    def _lone_link(self, token: re.Match) -> int:
        """A line of nothing but `[[prefix:…]]` is a category or another language, whatever they are called here."""
        self._pieces.append("\n")
        return token.end()

    def _paragraph(self, token: re.Match) -> int:
        while self._open and self._open[-1].kind in ("[[", "[[File:"):
            self._close_link(token)
        self._pieces.append("\n")
        return token.end()

    def _open_link(self, token: re.Match) -> int:
        target = token["target"]
        if target is None:  # no link, or a template stands in its target
            if _HIDDEN_TARGET.match(self._text, token.end()):
                self._begin("[[File:")
        elif token["stop"] == "|":
            self._begin("[[File:" if _is_hidden(target) else "[[", target)
        elif not _is_hidden(target) and not _LANGUAGE_TARGET.match(target):
            # [[http://a.b text]] is a link to the web in brackets.
            self._pieces.append(target.partition(" ")[2] if "://" in target else target.removeprefix(":"))
        return token.end()

    def _close_link(self, token: re.Match) -> int:
        if not self._open or self._open[-1].kind not in ("[[", "[[File:"):
            return token.end()
        link = self._open[-1]
        if link.kind == "[[File:":
            self._drop(link.kind)
            return token.end()
        self._open.pop()
        self._counts[link.kind] -= 1
        if not any(self._pieces[link.start : link.start + 2]):  # [[Town (river)|]]
            self._pieces.append(re.sub(r"\s*\([^()]*\)$", "", link.target.rpartition(":")[2]))
        return token.end()

    def _open_url(self, token: re.Match) -> int:
        self._url_at = token.end()
        return token.end()

    def _close_url(self, token: re.Match) -> int:
        if self._url_at is None or "\n" in self._text[self._url_at : token.start()]:
            self._pieces.append("]")
        self._url_at = None
        return token.end()

    def _magic_word(self, token: re.Match) -> int:
        if token["word"] == token["word"].upper():
            return token.end()
        self._pieces.append("__")
        return token.start() + 2

    def _begin(self, kind: str, target: str = "") -> None:
        self._open.append(_Open(kind, len(self._pieces), target))
        self._counts[kind] += 1

    def _drop(self, *kinds: str) -> _Open | None:
        """Deletes the innermost open one of these kinds, with all that began in it; None if there is none."""
        if not any(self._counts[kind] for kind in kinds):
            return None
        while True:
            last = self._open.pop()
            self._counts[last.kind] -= 1
            if last.kind in kinds:
                del self._pieces[last.start :]
                return last


@functools.cache
def _next_tag(name: str) -> re.Pattern:
    """Matches the tag's end, or its beginning where it is not closed at once."""
    return re.compile(rf"<(?:(?P<end>/){name}\s*|{name}(?=[\s/>])[^<>]*(?<!/))>", re.IGNORECASE)


def _is_hidden(target: str) -> bool:
    """Tells whether a link shows no text: a picture or a category; `[[:Category:X]]` is a link like others."""
    return bool(_HIDDEN_TARGET.match(target) or (not target.startswith(":") and _MEDIA_TARGET.fullmatch(target)))


def _first_variant(match: re.Match) -> str:
    """Returns what `-{zh-hans:…; zh-hant:…}-` says in the first of its scripts; flags H and T show nothing."""
    text = match["text"]
    if match["flags"] and set(match["flags"]) & set("HT-"):
        return ""
    name = _VARIANT_NAME.match(text)
    return text[name.end() :].partition(";")[0] if name else text


def _plain(line: str) -> str:
    """Returns a line without its list mark, without quote marks, and with characters for entities."""
    if marks := _LIST_MARKS.match(line):
        line = line[marks.end() :]
    if "''" in line:
        line = _without_quote_marks(line)
    if "&" in line:
        line = _ENTITY.sub(lambda entity: html.unescape(entity[0]).replace("\n", " "), line)
    return line


def _without_quote_marks(line: str) -> str:
    """Takes bold and italic marks away. Of four quote marks the first is a character, as in MediaWiki."""
    lengths = [len(marks) for marks in _QUOTES.findall(line)]
    bold = sum(length > 2 for length in lengths)
    italic = sum(length == 2 or length > 4 for length in lengths)
    if bold % 2 and italic % 2:  # "l'''amour''" is an l, an apostrophe, and amour in italics
        line = re.sub(r"(?<=\w)'''(?=\w)", "'", line, count=1)
    return _QUOTES.sub(lambda marks: "'" if len(marks[0]) == 4 else "", line)
