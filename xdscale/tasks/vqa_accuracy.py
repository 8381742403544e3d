"""VQA accuracy, as the challenge's public evaluation computes it.

The model's answer is compared, in normal form, with each nine of the ten that people gave, and counts min(1, equal ones
/ 3) each time. The mean over the ten ways is its credit: 0, .3, .6, .9, 1 for 0, 1, 2, 3 and more equal ones.
"""

import re
from collections.abc import Sequence
from functools import lru_cache

PEOPLE = 10
"""Answers to each question."""

_CREDITS = (0.0, 0.3, 0.6, 0.9, 1.0)

_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(number) for number, word in enumerate(_NUMBER_WORDS)} | {"none": "0"}
_ARTICLES = ("a", "an", "the")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
# The public evaluation means to spare full stops after a digit too, but its pattern spares those before one alone.
_FULL_STOP = re.compile(r"\.(?!\d)")
_MOST_FULL_STOPS = 32  # it passes re.UNICODE, which is 32, where `re.sub` takes the number of replacements

# Words without their apostrophes, as the public evaluation lists them (its own slips included).
_CONTRACTIONS = dict(
    pair.split("=")
    for pair in (
        "aint=ain't arent=aren't cant=can't couldve=could've couldnt=couldn't couldn'tve=couldn't've "
        "couldnt've=couldn't've didnt=didn't doesnt=doesn't dont=don't hadnt=hadn't hadnt've=hadn't've "
        "hadn'tve=hadn't've hasnt=hasn't havent=haven't hed=he'd hed've=he'd've he'dve=he'd've hes=he's howd=how'd "
        "howll=how'll hows=how's isnt=isn't itd=it'd itd've=it'd've it'dve=it'd've itll=it'll maam=ma'am "
        "mightnt=mightn't mightnt've=mightn't've mightn'tve=mightn't've mightve=might've mustnt=mustn't "
        "mustve=must've neednt=needn't notve=not've oclock=o'clock oughtnt=oughtn't ow's'at='ow's'at "
        "'ows'at='ow's'at 'ow'sat='ow's'at shant=shan't shed've=she'd've she'dve=she'd've shouldve=should've "
        "shouldnt=shouldn't shouldnt've=shouldn't've shouldn'tve=shouldn't've somebody'd=somebodyd "
        "somebodyd've=somebody'd've somebody'dve=somebody'd've somebodyll=somebody'll somebodys=somebody's "
        "someoned=someone'd someoned've=someone'd've someone'dve=someone'd've someonell=someone'll "
        "someones=someone's somethingd=something'd somethingd've=something'd've something'dve=something'd've "
        "somethingll=something'll thats=that's thered=there'd thered've=there'd've there'dve=there'd've "
        "therere=there're theres=there's theyd=they'd theyd've=they'd've they'dve=they'd've theyll=they'll "
        "theyre=they're theyve=they've twas='twas wasnt=wasn't wed've=we'd've we'dve=we'd've weve=we've "
        "werent=weren't whatll=what'll whatre=what're whats=what's whatve=what've whens=when's whered=where'd "
        "wheres=where's whereve=where've whod=who'd whod've=who'd've who'dve=who'd've wholl=who'll whos=who's "
        "whove=who've whyll=why'll whyre=why're whys=why's wont=won't wouldve=would've wouldnt=wouldn't "
        "wouldnt've=wouldn't've wouldn'tve=wouldn't've yall=y'all yall'll=y'all'll y'allll=y'all'll "
        "yall'd've=y'all'd've y'alld've=y'all'd've y'all'dve=y'all'd've youd=you'd youd've=you'd've "
        "you'dve=you'd've youll=you'll youre=you're youve=you've"
    ).split()
)


def credit(answer: str, given: Sequence[str]) -> float:
    """Returns the credit of an answer.

    Args:
        answer: the model's.
        given: the ten that people gave. Where all ten are the same text, normal forms are not asked for, as in the
            public evaluation.
    """
    given = [stripped(one) for one in given]
    answer = stripped(answer)
    if len(set(given)) > 1:
        given, answer = [normal_form(one) for one in given], normal_form(answer)
    return credit_of(given.count(answer))


def credit_of(equal: int) -> float:
    """Returns the credit of an answer that so many of ten people gave."""
    return _CREDITS[min(equal, len(_CREDITS) - 1)]


def stripped(answer: str) -> str:
    """Returns an answer on one line, without white space at its ends."""
    return answer.replace("\n", " ").replace("\t", " ").strip()


@lru_cache(maxsize=1 << 18)
def normal_form(answer: str) -> str:
    """Returns an answer in small letters without punctuation and articles, numbers up to ten as digits."""
    text = answer
    number = _COMMA_IN_NUMBER.search(answer) is not None
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if beside_space or number else " ")
    text = _FULL_STOP.sub("", text, count=_MOST_FULL_STOPS)
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
