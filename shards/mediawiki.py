"""MediaWiki XML dumps: pages out of the file, prose out of the wikitext."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO
from xml.etree import ElementTree

from xdscale.errors import XdscaleError

ARTICLE_NAMESPACE = "0"

_QUOTES = re.compile(r"'{2,}")
_LIST_MARKS = re.compile(r"^[*#:;]+\s*")


def read_pages(path: Path, stream: BinaryIO) -> Iterator[str]:
    """Yields the wikitext of each article (namespace 0, not a redirect) in constant memory.

    Raises:
        XdscaleError: malformed or truncated XML.
    """
    try:
        events = ElementTree.iterparse(stream, events=("start", "end"))
        _, root = next(events)
        for event, element in events:
            if event == "end" and _name(element) == "page":
                text = _article(element)
                root.clear()  # pages already read would otherwise stay children of the root
                if text:
                    yield text
    except ElementTree.ParseError as error:
        raise XdscaleError(f"{path}: malformed or truncated XML: {error}") from None


def page_lines(wikitext: str) -> list[str]:
    """Returns the lines of a page's prose: templates, tables, links, quote marks and list marks are gone.

    Raises:
        XdscaleError: gensim is not installed.
    """
    try:
        from gensim.corpora.wikicorpus import filter_wiki
    except ImportError:
        raise XdscaleError(
            "reading MediaWiki dumps needs gensim; install it with: pip install 'xdscale[wikipedia]'"
        ) from None
    prose = _QUOTES.sub("", filter_wiki(wikitext))
    return [_LIST_MARKS.sub("", line) for line in prose.split("\n")]


def _article(page: ElementTree.Element) -> str | None:
    """Returns the text of the page's last revision, or None for redirects and other namespaces."""
    text = None
    for element in page.iter():
        name = _name(element)
        if name == "redirect" or (name == "ns" and element.text != ARTICLE_NAMESPACE):
            return None
        if name == "text":
            text = element.text
    return text


def _name(element: ElementTree.Element) -> str:
    """Returns the tag without the export version's namespace."""
    return element.tag.rpartition("}")[2]
