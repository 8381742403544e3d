"""Hard-wrapped text comes back as the paragraphs it was; text whose lines are paragraphs is left alone."""

import json
import re
import textwrap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xdscale.shards.sources.corpus import read_documents, sort_out, stream_documents
from xdscale.shards.sources.wrapping import LEAST_PAIRS, count_words, joined, looks_wrapped


@pytest.fixture(scope="module")
def articles(wiki_dump):
    found = [[" ".join(text.split()) for text in document] for document in read_documents(wiki_dump)]
    return [document for document in found if sum(map(len, document)) > 3000][:20]


@settings(max_examples=60, deadline=None)
@given(
    paragraphs=st.lists(
        st.lists(st.from_regex(r"[a-z]{1,12}[,.]?", fullmatch=True), min_size=1), min_size=1, max_size=5
    ),
    width=st.integers(1, 90),
)
def test_wrapping_at_any_width_and_joining_is_the_identity(paragraphs, width):
    texts = [" ".join(words) for words in paragraphs]
    wrapped = "\n\n".join(textwrap.fill(text, width, break_long_words=False) for text in texts)
    assert joined(wrapped) == "\n".join(texts)


def test_breaks_at_hyphens_and_between_ideographs_leave_no_blank():
    assert joined("a well-\nknown town -\nor so") == "a well-known town - or so"
    assert joined("中文\n字a\nb文\n字 c\nd") == "中文字a b文字 c d"  # the two characters at the break tell
    assert joined("中文文字没有\n空格。\n\n新的一段 with\nEnglish") == "中文文字没有空格。\n新的一段 with English"


@pytest.mark.parametrize("width", [40, 72, 100])
def test_a_hard_wrapped_file_loses_no_words(articles, tmp_path, width):
    """As Project Gutenberg has it. Read line by line, last lines and short ones were lost."""
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(textwrap.fill(text, width) for article in articles for text in article))
    found = list(stream_documents(path))
    assert sum(document.joined for document in found) > len(found) / 2
    kept = [line for document in found for line in sort_out(document.text, "text", 5)[0]]
    # In "medium- or high-functioning" nothing tells that there was a blank.
    assert [text.replace("- ", "-") for text in kept] == [
        text.replace("- ", "-") for article in articles for text in article
    ]
    apart = [sort_out(document.text, "text", 5) for document in stream_documents(path, line_breaks="keep")]
    assert sum(left_out.short_words for _, left_out in apart) > 0


@pytest.mark.parametrize("how", ["paragraphs", "sentences", "lower"])
def test_lines_that_are_paragraphs_are_left_alone(articles, tmp_path, how):
    lines = [[line for text in article for line in cut(text, how) if line.strip()] for article in articles]
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join("\n".join(document) for document in lines))
    found = list(stream_documents(path))
    assert not any(document.joined for document in found)
    assert [document.text for document in found] == ["\n".join(document) for document in lines]


def cut(text, how):
    sentences = re.split(r"(?<=\.) ", text)
    return {"paragraphs": [text], "sentences": sentences, "lower": [s.lower().strip(".") for s in sentences]}[how]


def test_rows_are_judged_one_by_one(articles, tmp_path):
    wrapped = "\n\n".join(textwrap.fill(text, 72) for text in articles[0])
    plain = "\n".join(articles[1])
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in (wrapped, plain)))
    found = list(stream_documents(path))
    assert [document.joined for document in found] == [True, False]
    assert found[0].text == "\n".join(articles[0])
    assert found[1].text == plain


def test_text_edited_after_wrapping_is_seen_too():
    """Lines of uneven lengths that go on in lower case."""
    lines = ["The river that runs", "slowly past the old walls of the town is", "wide here, and boats", "pass on it"]
    assert looks_wrapped("\n\n".join(["\n".join(lines)] * 9))
    assert not looks_wrapped("\n\n".join(["\n".join(line.lower() for line in lines)] * 9))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("one two  three", 3),
        ("naïve café", 2),
        ("中文文字没有空格。", 8),
        ("使用Transformer模型", 5),
        ("東京タワー", 5),
        ("ภาษาไทย", 7),
        ("한국어는 띄어 쓴다", 3),
        ("«Слово» и дело", 3),
    ],
)
def test_words(line, words):
    """Between blanks; where a script has none between words, characters."""
    assert count_words(line) == words


def test_chinese_and_thai_keep_their_paragraphs():
    for line in ("河水人的野天山低用造小镇和，麦过较水用桥易山丘附建在。", "แม่น้ำไหลช้าๆ ผ่านกำแพงเก่า"):
        assert sort_out(line, "text", 5)[0] == [line]
    assert sort_out("历史", "text", 5)[0] == []


def wrapped(pairs, *, full=0, ended=0, width=40):
    """One paragraph in lower case; so many of its pairs of lines are full, and so many lines end as sentences do."""
    lines = []
    for number in range(pairs):
        line = "word " + ("b" * (width - 5) if number < full else "b" * 12)
        lines.append(line[:-1] + "." if number < ended else line)
    return "\n".join([*lines, "word at the end"])


def test_three_lines_of_four_are_full_in_wrapped_text():
    assert looks_wrapped(wrapped(20, full=15))
    assert not looks_wrapped(wrapped(20, full=14))


def test_half_of_the_lines_may_end_as_sentences_do():
    assert looks_wrapped(wrapped(20, full=20, ended=10))
    assert not looks_wrapped(wrapped(20, full=20, ended=11))


def test_a_line_is_full_where_the_next_word_would_just_not_fit():
    """A blank stands before it: a word as long as what is left does not fit."""
    for word, is_full in (("fives", True), ("four", False)):
        lines = [f"{word} {'b' * (34 - len(word))}" for _ in range(20)]  # of 35 letters
        assert looks_wrapped("\n".join(["b" * 40, "b" * 40, *lines, f"{word} end"])) == is_full


def test_few_lines_tell_nothing():
    assert looks_wrapped(wrapped(LEAST_PAIRS, full=LEAST_PAIRS))
    assert not looks_wrapped(wrapped(LEAST_PAIRS - 1, full=LEAST_PAIRS))


@pytest.mark.parametrize(("begun", "continued", "is_wrapped"), [(2, 6, True), (1, 6, False), (2, 5, False)])
def test_uneven_lines_are_wrapped_where_paragraphs_begin_and_lines_go_on_as_sentences_do(begun, continued, is_wrapped):
    """Half of four paragraphs in upper case, and six lines of ten in lower case, are just enough."""
    lines, left = [], continued
    for number in range(4):
        first = "Word" if number < begun else "word"
        lines.append([f"{first} {'b' * (40 if number == 0 else 12)}"])
        for _ in range(3 if number < 2 else 2):
            lines[-1].append(f"{'word' if left > 0 else 'Word'} and so on")
            left -= 1
    assert looks_wrapped("\n\n".join("\n".join(paragraph) for paragraph in lines)) == is_wrapped


@pytest.mark.parametrize(("width", "is_wrapped"), [(29, False), (30, True), (200, True), (201, False)])
def test_lines_are_wrapped_at_30_to_200_characters(width, is_wrapped):
    assert looks_wrapped(wrapped(20, full=20, width=width)) == is_wrapped


@pytest.mark.parametrize(
    ("lines", "line"),
    [
        ("a well-\nknown man", "a well-known man"), ("so -\nor so", "so - or so"), ("-\nso", "- so"),
        ("x-\nray", "x-ray"), ("河水\n人的", "河水人的"), ("河水\nriver", "河水 river"), ("river\n河水", "river 河水"),
        (" one \n  two\n\n\nthree\nfour ", "one two\nthree four"), ("one\n \ntwo", "one\ntwo"), ("", ""),
    ],
)  # fmt: skip
def test_lines_are_joined_as_they_were_before_the_break(lines, line):
    assert joined(lines) == line
