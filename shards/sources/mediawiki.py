"""MediaWiki XML dumps of any export version: the wikitext of articles, whole pages only."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO
from xml.etree import ElementTree
from xml.parsers import expat

from xdscale.errors import XdscaleError
from xdscale.files import count_of

ARTICLE_NAMESPACE = "0"
PREFIX_FORMAT = "mediawiki-prefix"
"""The format to ask for where a dump is known to end in the middle of a page."""

# MediaWiki knows these in every language; a dump before export-0.5 has no <ns>, and its first part may be all there is.
_SUBJECTS = ("user", "project", "wikipedia", "file", "image", "mediawiki", "template", "help", "category")
_NAMESPACES = frozenset(("media", "special", "talk", *_SUBJECTS, *(f"{name} talk" for name in _SUBJECTS)))
# "#REDIRECT [[A]]", "#WEITERLEITUNG [[A]]", "#перенаправление [[A]]": no article begins with such a line.
_REDIRECT = re.compile(r"\s*#[^\W\d_][^][\s{}|]{1,40}(?: [^][\s{}|]{1,40})?\s{0,9}:?\s{0,9}\[\[[^][\n]+\]\]")
_CANONICAL = {"6": "File", "14": "Category"}
_CUT = (
    expat.errors.codes[expat.errors.XML_ERROR_NO_ELEMENTS],
    expat.errors.codes[expat.errors.XML_ERROR_UNCLOSED_TOKEN],
    expat.errors.codes[expat.errors.XML_ERROR_UNCLOSED_CDATA_SECTION],
    expat.errors.codes[expat.errors.XML_ERROR_PARTIAL_CHAR],
)


def read_pages(path: Path, stream: BinaryIO, *, prefix: bool = False) -> Iterator[str]:
    """Yields the wikitext of each article (namespace 0, not a redirect) in constant memory.

    The wiki's own names for the namespaces File and Category, as the dump states them, become these.

    Args:
        path: names the file in errors.
        stream: the XML.
        prefix: the dump may end anywhere, as enwik8 does; the whole pages before are read.

    Raises:
        XdscaleError: malformed or truncated XML, with the number of whole pages before and the last one's title.
    """
    pages = _Pages()
    try:
        yield from pages.articles(stream)
    except EOFError:
        raise XdscaleError(
            f"{path}: the compressed file is truncated {pages.place}; copy or download it again, or decompress what is "
            f"there and read that with --format {PREFIX_FORMAT}"
        ) from None
    except ElementTree.ParseError as error:
        if error.code not in _CUT:
            raise XdscaleError(f"{path}: malformed XML {pages.place}: {error}; download it again") from None
        if not prefix:
            raise XdscaleError(
                f"{path}: truncated XML: it ends {pages.place}; copy or download it again, or, if it is meant to be "
                f"the beginning of a dump (as enwik8 is), read its whole pages with --format {PREFIX_FORMAT}"
            ) from None


class _Pages:
    """Reads one dump; knows how far it got."""

    def __init__(self) -> None:
        self._count = 0
        self._title = ""
        self._namespaces = _NAMESPACES
        self._own_links: tuple[tuple[re.Pattern, str], ...] = ()

    @property
    def place(self) -> str:
        """Where reading stopped, in words."""
        last = f", the last one {self._title!r}" if self._count else ""
        return f"after {count_of(self._count, 'whole page')}{last}"

    def articles(self, stream: BinaryIO) -> Iterator[str]:
        """Yields their texts."""
        events = ElementTree.iterparse(stream, events=("start", "end"))
        _, root = next(events)
        for event, element in events:
            if event == "start":
                continue
            name = _name(element)
            if name == "siteinfo":
                self._learn_namespaces(element)
            elif name == "page":
                text = self._article(element)
                self._count += 1
                root.clear()  # pages already read would otherwise stay children of the root
                if text:
                    yield text

    def _learn_namespaces(self, siteinfo: ElementTree.Element) -> None:
        found = {
            element.get("key", ""): element.text.strip()
            for element in siteinfo.iter()
            if _name(element) == "namespace" and element.text
        }
        self._namespaces |= {name.lower() for key, name in found.items() if key != ARTICLE_NAMESPACE}
        self._own_links = tuple(
            (re.compile(rf"\[\[\s*{re.escape(found[key])}\s*:", re.IGNORECASE), f"[[{canonical}:")
            for key, canonical in _CANONICAL.items()
            if found.get(key, canonical) != canonical
        )

    def _article(self, page: ElementTree.Element) -> str | None:
        """Returns the text of the page's last revision, or None for redirects and other namespaces."""
        title, namespace, text = "", None, None
        for element in page.iter():
            name = _name(element)
            if name == "redirect":
                return None
            if name == "title":
                self._title = title = element.text or ""
            elif name == "ns":
                namespace = element.text
            elif name == "text":
                text = element.text
        other = self._is_elsewhere(title) if namespace is None else namespace != ARTICLE_NAMESPACE
        if other or text is None or _REDIRECT.match(text):
            return None
        for own, canonical in self._own_links:
            text = own.sub(canonical, text)
        return text

    def _is_elsewhere(self, title: str) -> bool:
        """Tells by the title whether a page lies outside the articles' namespace."""
        prefix, colon, _ = title.replace("_", " ").lower().partition(":")
        return bool(colon) and prefix.strip() in self._namespaces


def _name(element: ElementTree.Element) -> str:
    """Returns the tag without the export version's namespace."""
    return element.tag.rpartition("}")[2]
