"""CoNLL-U parses of captions: words where they stand, and dependencies whose governor stands in a phrase."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xdscale.analysis.conllu import arcs, read_parses
from xdscale.data.task_files import Example, Span
from xdscale.errors import XdscaleError
from xdscale.tasks.flickr30k_entities import Phrase

CAPTION = "Two  big dogs can't run ."
LINES = (
    "# text = Two big dogs can't run .",
    "1\tTwo\ttwo\tNUM\tCD\t_\t3\tnum\t_\t_",
    "2\tbig\tbig\tADJ\tJJ\t_\t3\tamod\t_\t_",
    "3\tdogs\tdog\tNOUN\tNNS\t_\t6\tnsubj\t_\t_",
    "4-5\tcan't\t_\t_\t_\t_\t_\t_\t_\t_",
    "4\tca\tcan\tAUX\tMD\t_\t6\taux\t_\t_",
    "5\tn't\tnot\tPART\tRB\t_\t6\tneg\t_\t_",
    "5.1\tempty\t_\t_\t_\t_\t_\t_\t_\t_",
    "6\trun\trun\tVERB\tVB\t_\t0\troot\t_\t_",
    "7\t.\t.\tPUNCT\t.\t_\t6\tpunct\t_\t_",
)


def write(path, *sentences):
    path.write_text("".join("\n".join(lines) + "\n\n" for lines in sentences), encoding="utf-8")
    return path


def phrase(start, end):
    return Example(
        "1#0#0", ((CAPTION,),), 1, 1, spans=(((Span(start, end, -1),),),), truth=Phrase(((0, 0, 1, 1),), ("x",))
    )


def test_words_stand_where_the_caption_has_them(tmp_path):
    (words,) = read_parses(write(tmp_path / "a.conllu", LINES), [CAPTION])
    assert [CAPTION[word.start : word.end] for word in words] == ["Two", "big", "dogs", "ca", "n't", "run", "."]
    assert [word.head for word in words] == [2, 2, 5, 5, 5, -1, 5]
    assert words[1].relation == "amod"


def test_arcs_go_from_words_of_a_phrase_to_what_depends_on_them(tmp_path):
    """Of w1 -> w2 the governor w1 stands in the phrase; heads are asked from w2 (spec VisualBERT §7, §9)."""
    (words,) = read_parses(write(tmp_path / "a.conllu", LINES), [CAPTION])
    dogs, running = phrase(0, 13), phrase(20, 23)
    found = [
        (arc.relation, arc.example is dogs, CAPTION[slice(*arc.dependent)]) for arc in arcs(words, [dogs, running])
    ]
    assert found == [
        ("num", True, "Two"), ("amod", True, "big"), ("nsubj", False, "dogs"), ("aux", False, "ca"),
        ("neg", False, "n't"), ("punct", False, "."),
    ]  # fmt: skip
    assert list(arcs(words, [])) == []
    assert list(arcs(words, [phrase(0, 8)])) == []  # the phrase without its governing noun


@given(st.lists(st.text("abc'.-", min_size=1, max_size=4), min_size=1, max_size=8), st.randoms())
def test_every_word_is_found_whatever_white_space_lies_between(tmp_path_factory, forms, random):
    caption = "".join(form + random.choice(["", " ", "  "]) for form in forms)
    lines = [f"{n}\t{form}\t_\t_\t_\t_\t{n - 1}\tdep\t_\t_" for n, form in enumerate(forms, 1)]
    (words,) = read_parses(write(tmp_path_factory.mktemp("c") / "a.conllu", lines), [caption])
    assert [caption[word.start : word.end] for word in words] == forms


@pytest.mark.parametrize(
    ("line", "changed", "message"),
    [
        (2, "2\tbig", "line 3: 2 columns, expected 10 with tabs"),
        (2, "2\tbig\t_\t_\t_\t_\t9\tamod\t_\t_", "line 3: head = '9'; expected another word, 1 to 7, or 0"),
        (2, "2\tbig\t_\t_\t_\t_\t2\tamod\t_\t_", "line 3: head = '2'; expected another word"),
        (2, "2\tbig\t_\t_\t_\t_\t_\tamod\t_\t_", "line 3: head = '_'; expected another word"),
        (2, "2\tsmall\t_\t_\t_\t_\t3\tamod\t_\t_", "line 3: 'small' does not follow in the caption: .  big dogs"),
        (2, "1\tbig\t_\t_\t_\t_\t3\tamod\t_\t_", "line 3: word '1', expected 2; is an empty line missing"),
    ],
)
def test_odd_lines_are_named(tmp_path, line, changed, message):
    path = write(tmp_path / "a.conllu", [*LINES[:line], changed, *LINES[line + 1 :]])
    with pytest.raises(XdscaleError, match=rf"a\.conllu, {message}"):
        read_parses(path, [CAPTION])


def test_as_many_sentences_as_captions(tmp_path):
    path = write(tmp_path / "a.conllu", LINES, LINES)
    assert len(read_parses(path, [CAPTION, CAPTION])) == 2
    with pytest.raises(XdscaleError, match=r"a\.conllu, line 13: a further sentence than 1 caption$"):
        read_parses(path, [CAPTION])
    with pytest.raises(XdscaleError, match=r"a\.conllu: 2 sentences, expected 3, one for each caption"):
        read_parses(path, [CAPTION] * 3)
    path.write_bytes(b"\xff")
    with pytest.raises(XdscaleError, match="not UTF-8"):
        read_parses(path, [CAPTION])
    with pytest.raises(XdscaleError, match="cannot be read: No such file"):
        read_parses(tmp_path / "b.conllu", [CAPTION])
