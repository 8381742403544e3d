"""Pages of dumps of every export version, whole or cut short."""

import bz2
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xdscale.errors import XdscaleError
from xdscale.shards.sources.corpus import read_documents, stream_documents
from xdscale.shards.sources.text import TextOptions, build_shards

SAID = "five words of an article"
OLD_NAMES = {"-2": "Media", "1": "Diskussion", "4": "Wikipedia", "6": "Bild", "8": "MediaWiki", "10": "Vorlage",
             "14": "Kategorie", "100": "Portal"}  # fmt: skip


def old_page(title, text):
    """A page as export-0.3 has it: neither <ns> nor <redirect/>."""
    return f"<page><title>{title}</title><id>1</id><revision><id>1</id><text>{text}</text></revision></page>\n"


def old_dump(*pages, names=OLD_NAMES, case="first-letter"):
    spaces = "".join(f'<namespace key="{key}">{name}</namespace>' for key, name in names.items())
    info = f"<siteinfo><case>{case}</case><namespaces>{spaces}<namespace key='0' /></namespaces></siteinfo>"
    return f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.3/">{info}{"".join(pages)}</mediawiki>'


def titles(path, **options):
    """The first word of each document: the tests write the title there."""
    return [document.text.split(" ")[0] for document in stream_documents(path, **options)]


@pytest.mark.parametrize(
    ("title", "article"),
    [
        ("Town", True),
        ("2001: A Space Odyssey", True),
        ("Small Talk: a novel", True),
        ("Talkative", True),
        ("Talk:Town", False),
        ("Diskussion:Stadt", False),
        ("user_talk:Someone", False),
        ("Benutzer: not a name here", True),
        ("vorlage:Infobox", False),
        ("Template:Infobox", False),
        ("Portal:Stadt", False),
        ("MediaWiki:Sitenotice", False),
        ("Image:A.jpg", False),
        ("Special: anything", False),
    ],
)
def test_a_title_tells_the_namespace_where_the_dump_does_not(tmp_path, title, article):
    path = tmp_path / "old.xml"
    path.write_text(old_dump(old_page(title, SAID), old_page("Other", SAID)), encoding="utf-8")
    assert len(titles(path)) == 1 + article


def test_the_number_of_the_namespace_counts_where_there_is_one(tmp_path):
    path = tmp_path / "new.xml"
    pages = old_page("Talk:Ns", f"Ns {SAID}").replace("<id>", "<ns>0</ns><id>", 1)
    pages += old_page("Plain", SAID).replace("<id>", "<ns>118</ns><id>", 1)
    path.write_text(old_dump(pages))
    assert titles(path) == ["Ns"]


@pytest.mark.parametrize(
    "text",
    [
        "#REDIRECT [[Town]]", "#redirect[[Town]]", "\n #Redirect: [[Town#part|x]] {{R from}}",
        "#WEITERLEITUNG [[Stadt]]",
        "#REDIRECCIÓN [[Pueblo]]", "#перенаправление [[Город]]", "#重定向 [[城市]]", "#تحويل [[مدينة]]", "#đổi [[a]]",
        "#REDIRECTION [[Ville]]\n[[Catégorie:X]]",
    ],
)  # fmt: skip
def test_a_redirect_is_none_in_any_language(tmp_path, text):
    path = tmp_path / "old.xml"
    kept = ["# [[Town]] is an item of a list", "#1 [[Town]]", "Town #REDIRECT [[Town]]", "#Hashtag of a [[town]]"]
    path.write_text(old_dump(*(old_page("Town", item) for item in (text, *kept))), encoding="utf-8")
    assert [document.text for document in stream_documents(path)] == kept


def test_pictures_and_categories_by_the_names_that_the_dump_states(tmp_path):
    path = tmp_path / "de.xml"
    text = f"Ein {SAID} [[bild:X|mini|a caption of five words]][[ Kategorie :A|B]] hier.\n* [[Kategorie:A]]"
    path.write_text(old_dump(old_page("Stadt", text)), encoding="utf-8")
    assert list(read_documents(path)) == [[f"Ein {SAID}  hier."]]


@pytest.fixture(scope="module")
def dump():
    return old_dump(*(old_page(f"Town {number}", f"{number} é {SAID} &amp; more") for number in range(9))).encode()


@settings(max_examples=80, deadline=None)
@given(cut=st.integers(30, 1_636))
def test_a_dump_cut_anywhere_is_named_or_read_as_far_as_it_is_whole(dump, cut, tmp_path_factory):
    check_cut(dump, cut, tmp_path_factory.mktemp("cut") / "enwik")


def test_a_dump_cut_within_a_character_is_cut_and_no_other_encoding(dump, tmp_path):
    check_cut(dump, dump.index("é".encode()) + 1, tmp_path / "enwik")


def check_cut(dump, cut, path):
    path.write_bytes(dump[:cut])
    whole = dump[:cut].count(b"</page>")
    last = f", the last one 'Town {whole - 1}'" if whole else ""
    said = rf"enwik: truncated XML: it ends after {whole} whole pages?{last}; copy .* --format mediawiki-prefix"
    with pytest.raises(XdscaleError, match=said):
        list(stream_documents(path))
    assert titles(path, format="mediawiki-prefix") == [str(number) for number in range(whole)]
    path.write_bytes(dump)
    assert titles(path, format="mediawiki-prefix") == titles(path) == list("012345678")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16-le", "utf-16-be"])
def test_a_dump_may_be_written_in_any_of_unicodes_encodings(dump, tmp_path, encoding):
    path = tmp_path / "a.xml"
    path.write_bytes(("\ufeff" * encoding.startswith("utf-16") + dump.decode()).encode(encoding))
    assert titles(path) == list("012345678")


@pytest.mark.parametrize("format", ["auto", "mediawiki-prefix"])
def test_damage_in_the_middle_is_no_end(dump, tmp_path, format):
    path = tmp_path / "a.xml"
    path.write_bytes(dump.replace(b"</text>", b"</txt>"))
    with pytest.raises(XdscaleError, match=r"a\.xml: malformed XML after 0 whole pages: mismatched tag: line"):
        list(stream_documents(path, format=format))


@pytest.mark.parametrize("threads", [1, 3])
def test_a_truncated_compressed_dump_says_how_many_pages_it_has(tmp_path, threads):
    chance = random.Random(3)
    pages = [
        old_page(f"Town {number}", " ".join(map(str, chance.choices(range(10**6), k=900)))) for number in range(200)
    ]
    content = old_dump(*pages).encode()
    path = tmp_path / "a.xml.bz2"
    half = len(content) // 2
    path.write_bytes((bz2.compress(content[:half]) + bz2.compress(content[half:]))[:-99])
    with pytest.raises(
        XdscaleError, match=r"a\.xml\.bz2: the compressed file is truncated after \d\d+ whole pages, the .*prefix"
    ):
        list(stream_documents(path, threads=threads))


def test_shards_of_the_beginning_of_a_dump(dump, cassette_model, tmp_path):
    """The same shards as those of a whole dump of these pages, but for the name of the format and the input."""
    whole, cut = tmp_path / "whole.xml", tmp_path / "cut.xml"
    pages = dump.partition(b"</siteinfo>")[0] + b"</siteinfo>" + 99 * dump.partition(b"</siteinfo>")[2][:-12]
    whole.write_bytes(pages + b"</mediawiki>")
    cut.write_bytes(pages + b"<page><title>Hal")
    options = {"language_tokenizer": str(cassette_model), "sequence_length": 30}
    one = build_shards([whole], tmp_path / "one", TextOptions(**options))
    with pytest.raises(XdscaleError, match="after 891 whole pages"):
        build_shards([cut], tmp_path / "none", TextOptions(**options))
    two = build_shards([cut], tmp_path / "two", TextOptions(format="mediawiki-prefix", **options))
    assert one.splits == two.splits
    assert two.counts == one.counts
