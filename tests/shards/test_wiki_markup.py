"""What of a page is prose, by MediaWiki's rules as mediawiki.org states them; and any page ends soon."""

import random
import re
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from xdscale.shards.sources.corpus import paragraphs, read_documents
from xdscale.shards.sources.wiki_markup import prose_lines

MARKUP = [
    "{{", "}}", "{{{", "}}}", "{{a|", "{{a|b=", "[[", "]]", "[[a|", "[[a]]", "[[File:a|", "[[File:a.jpg|", "[[:a:b]]",
    "[[fr:a]]", "[http://x ", "[//x ", "[mailto:a ", "[", "]", "{|\n", "\n{|\n", "\n|}", "\n|-\n|a", "\n|", "\n!",
    "<ref>", "</ref>", "<ref name=a/>", "<ref/ >", "<ref", "<div>", "</div>", "<div ", "<b a=", '<b a="', "<table>",
    "</table>", "<nowiki>", "</nowiki>", "<nowiki/>", "<math>", "</math>", "<pre>\n", "<gallery>", "<code>", "<br/>",
    "<stdio.h>", "<", ">", "<!--", "-->", "'''", "''", "'", "-{", "}-", "-{zh-hans:", ";", "&", "&amp;", "&#10;",
    "__NOTOC__", "__", "_", "\n==", "==\n", "\n* ", "\n----", "\n:;", "\n", "\n\n", " ", "|", "=", ":", "#", "a",
    "word", "é",
]  # fmt: skip
SAID = "the old town stands by the river"


def prose(wikitext):
    return [line for line in prose_lines(wikitext) if line]


@pytest.mark.parametrize(
    "note",
    [
        "<ref>Smith</ref>",
        "<ref>Smith, John.<br/>A long history. p. 3</ref>",
        "<ref>Note<nowiki/>https://a.b/1.html and more</ref>",
        "<ref name=x>{{cite web|url=http://a/b/}}</ref>",
        '<ref name="x" /><ref name=x/>',
        "<ref\nname='x'>[http://a.b/?c=1&d=2 16] {{Wayback|url=http://a.b/}}</ref>",
        "<REF>a < b, <math>x</math> {{b</Ref >",
        "<references><ref name=a>Smith</ref></references>",
        "{{citation needed|date={{CURRENTYEAR}}|[[a|b]]}}",
        "{{{1|{{{2}}}}}}",
        "<!-- hidden }} {{ ]] words -->",
        "<math>x = {{\\frac{a}{b}}}</math>",
        "<chem>H2O</chem><ce>H2O</ce>",
        "<score>\\relative c' { c d e }</score>",
        '<syntaxhighlight lang="c">int main(void) {{ return a[[0]]; }}</syntaxhighlight>',
        "<source lang=c>int a;</source><code>int a;</code><pre>int a;</pre>",
        "<gallery mode=packed>\nFile:A.jpg|A caption with [[many]] words\nB.png|Another\n</gallery>",
        "<timeline>ImageSize = width:800</timeline>",
        '<templatestyles src="A/styles.css" /><section begin=a />',
        "[[File:A b.jpg|thumb|The [[mill]] in [[1900]], from [[west|the west]] {{c|[[d]]}}]]",
        "[[Image:X.png|300px]][[file:x.svg]]",
        "[[Datei:X.png|mini|Bild der [[Stadt]]]]",
        "[[File:{{PAGENAME}}.jpg|thumb|words]]",
        "[[Category:Towns|Sort key]][[category:X]]",
        "[[fr:Ville]][[zh-min-nan:X]][[simple:Town]]",
        "__NOTOC____KEIN_INHALTSVERZEICHNIS__",
        "-{H|zh-hans:a;zh-hant:b}-",
        "<table><tr><td>cell<table><tr><td>inner</td></tr></table>rest</td></tr></table>",
    ],
)
def test_what_is_no_prose_goes_and_the_text_around_it_stays(note):
    """Anywhere: within a line, on a line of its own, before the first line."""
    assert " ".join(" ".join(prose(f"Then{note} {SAID}.\n{note}\nEnd.{note}")).split()) == f"Then {SAID}. End."


@pytest.mark.parametrize(
    ("marked", "read"),
    [
        ("[[Town]] [[Town|place]]s [[Town (river)|]] [[:Category:X|the category]] [[:fr:Ville]]",
         "Town places Town the category fr:Ville"),
        ("[[a|b ''c'' {{d}} [http://e f]]] [[fr:Ville|ville]] [[Star Trek: Voyager]]",
         "b c  f ville Star Trek: Voyager"),
        ("[http://a.b the site] [https://a.b] [//a.b it] http://a.b/c [sic] x[1] [[http://a.b net]]",
         "the site  it http://a.b/c [sic] x[1] net"),
        ("see [http://a.b its\nsite] of x[1] [http://a.b c][2]", "see its\nsite] of x[1] c[2]"),
        ("[[Help:Town (river)|]] [[Town|]] [[Town (a) b|]]", "Town Town Town (a) b"),
        ("'''Bold''', ''italic'', '''''both''''' and ''''four'''' don't", "Bold, italic, both and 'four' don't"),
        ("L'auteur de l'''Iliade'' et l{{'}}''Odyssée'', '''Homère'''", "L'auteur de l'Iliade et lOdyssée, Homère"),
        ("<nowiki>''[[a]]'' {{b}} <i>&amp;</i> '''</nowiki> c", "''[[a]]'' {{b}} <i>&</i> ''' c"),
        ("<nowiki>* no list</nowiki>", "* no list"),
        ("said [[Media:A.ogg|so]], [[:File:A.jpg|this picture]]", "said so, this picture"),
        ("a < b, c > d, x<y>z, <stdio.h>, 1 <2", "a < b, c > d, x<y>z, <stdio.h>, 1 <2"),
        ("&lt;br&gt; &amp;nbsp; &mdash; a&nbsp;b &#233; &copy=1 AT&T", "<br> &nbsp; — a\xa0b é &copy=1 AT&T"),
        ("a<br>b <small>c</small><sup id=x>2</sup> <font color='red'>d</font>", "a b c2 d"),
        ("-{zh-hans:计算机; zh-hant:電腦}- -{A|b}- -{c}-", "计算机 b c"),
        ("__init__ and snake__case__name", "__init__ and snake__case__name"),
        ("a | b || c ! d = e", "a | b || c ! d = e"),
        ("* a\n** b\n#: c\n; d\n: e\n---- f", "a\nb\nc\nd\ne\nf"),
        ("{|\n! a\n| b {|\n|-\n| {{c|\n|}}\n{|\n| d\n|}\n| e\n|}\nf\n:{| g\n|}h", "f\nh"),
        ("{{Infobox\n| a = {{b}}\n| c = {|\n| d\n|}\n|}}e", "e"),
        ("x <poem>\na\nb</poem>", "x\na\nb"),
        ("a\n[[Kategorie:Stadt]]\n[[Bogus word:b|c]]\n", "a"),
    ],
)  # fmt: skip
def test_what_a_reader_sees_stays(marked, read):
    assert prose(marked) == read.split("\n")


@pytest.mark.parametrize(
    "mark",
    [
        "{{", "{{a|", "{{{", "[[", "[[a|", "<", "<b", "<ref>", "<math>", "<code>", "<nowiki>",
        "[http://x.y ", "'''", "''", "{|\n|", "\n{| class=a\n", "<div style='a", "<table>", "-{", "__", "}}", "]]",
        "</ref>",
    ],
)  # fmt: skip
def test_what_is_never_closed_hides_nothing(mark):
    said = f"Before {mark} {SAID}.\n\nA second paragraph {SAID}.\n"
    for rest in ("", "Then {{a|b}} [[c|d]] <ref>e</ref>\n{|\n|f\n|}\n", "<math>x</math> <b>y</b>"):
        found = "\n".join(prose(said + rest))
        assert f"A second paragraph {SAID}." in found
        assert "e</ref>" not in found or mark == "<ref"
        assert f"{SAID}.\n" in found.replace("|", "") or mark.strip().startswith("{|")


def test_what_is_never_closed_leaves_no_rows_parameters_or_files():
    for start in (
        "{{Infobox town",
        "{|",
        "<gallery>",
        "[[File:A.jpg|thumb|a caption of some words",
        "<!-- hidden words",
    ):
        rows = "\n| name = a value of some words\nFile:B c.jpg|a caption of some words" if start[:2] != "[[" else ""
        assert f"{SAID}." == prose(f"{start}{rows}\n\n{SAID}.")[-1]
        assert not any("words" in line for line in prose(f"{start}{rows}\n\n{SAID}."))


def test_a_reference_begun_twice_does_not_swallow_what_is_between():
    assert prose(f"a<ref>b {SAID}\n\n{SAID} c<ref>d</ref>.\n") == [f"ab {SAID}", f"{SAID} c."]


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(
        st.characters(exclude_characters="<>{}[]|=*#:;!&'_-", exclude_categories=["C", "Z"]) | st.sampled_from(" \n")
    )
)
@example(text="5 + 3 / 2 (a, b) “c” $d% é 中文\n\n\nthen")
def test_text_without_markup_comes_out_unchanged(text):
    assert prose_lines(text) == [line.strip() for line in text.split("\n")]


@settings(max_examples=300, deadline=None)
@given(soup=st.lists(st.sampled_from(MARKUP), max_size=60))
def test_any_soup_gives_lines(soup):
    lines = prose_lines("".join(soup))
    assert not any("\n" in line for line in lines)
    assert sum(map(len, lines)) <= sum(map(len, soup))


def seconds(text):
    started = time.process_time()
    prose_lines(text)
    return time.process_time() - started


@pytest.mark.parametrize("first", range(0, len(MARKUP), 12))
def test_a_page_of_one_mark_again_and_again_ends_soon(first):
    """30 kB of a mark, alone and with others, take 0.03 s; with a search to the end of the page for each, seconds."""
    chance = random.Random(first)
    for mark in MARKUP[first : first + 12]:
        for repeated in (mark, mark + chance.choice(MARKUP), chance.choice(MARKUP) + mark + chance.choice(MARKUP)):
            many = 30_000 // len(repeated)
            assert seconds(repeated * many) < 1, repeated
            half = many // 2
            assert seconds(mark * half + chance.choice(MARKUP) * half) < 1, mark


@settings(max_examples=20, deadline=None)
@given(
    soup=st.lists(st.sampled_from(MARKUP), min_size=1, max_size=8), tail=st.lists(st.sampled_from(MARKUP), max_size=8)
)
def test_time_is_proportional_to_the_length(soup, tail):
    """8 times the text may take 8 times as long, times 4 for noise; quadratic work takes 64 times as long.

    What another process does to the caches may triple a time: the shortest of three is taken, once it matters.
    """
    text, end = "".join(soup), "".join(tail)
    count = 10_000 // len(text + end)
    short = min(seconds(text * count + end * count) for _ in range(3))
    assert any(seconds(text * 8 * count + end * 8 * count) < 4 * 8 * max(short, 0.005) for _ in range(3))


def test_the_real_dump_keeps_its_prose_and_loses_its_markup(wiki_dump):
    kept = [line for document in read_documents(wiki_dump) for line in document]
    assert len(kept) == 7401
    left = re.compile(
        r"\[\[|\]\]|\{\||\|\}|\{\{|\}\}|''|</?(?:ref|br|div|math|gallery)|^(?:File|Image|Category):|&\w+;|__[A-Z]+__"
    )
    assert [line for line in kept if left.search(line)] == []
    assert any(line.startswith("Golden eagle") for line in kept) is False  # a picture's caption
    assert paragraphs("== A heading of many words ==", "mediawiki", 5) == []


@pytest.mark.parametrize(
    ("wikitext", "lines"),
    [
        ("a {{b}} c }} d", ["a  c  d"]),
        ("a {{{b}}} c }}} d", ["a  c  d"]),
        ("{|\n|a\n|}\n! b\n|} c", ["! b", "c"]),
        ("[[a]] b ]] c", ["a b  c"]),
    ],
)
def test_what_closes_nothing_is_left_out_alone(wikitext, lines):
    assert prose(wikitext) == lines
