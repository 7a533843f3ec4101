"""Case markers: a rewriting of text that can be undone, whatever the text."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairway.data.case import ALL_CAPITALS as A
from fairway.data.case import CAPITAL as C
from fairway.data.case import ESCAPE as E
from fairway.data.case import INNER as I
from fairway.data.case import MARKERS, fold, unfold

HARD = "aAbBzZ \n\t'1éÉſK\u2028▁\ue001\ue010\ue011\ue012\ue013\ue014\ue015\ue018\ue019\ue01a"
texts = st.one_of(st.text(), st.text(HARD, max_size=12))


@pytest.mark.parametrize(
    ("text", "folded"),
    [
        ("no capital", "no capital"),
        ("The end", f"{C}the end"),
        ("at The end", f"at{C} the end"),
        ("end.\n\n The", f"end.{C}\n\n the"),
        ("I am NASA's", f"{C}i am{A} nasa's"),
        ("iPhone, McDonald, USAs", f"i{I}phone,{C} mc{I}donald,{C} u{I}s{I}as"),
        ("eBAY", f"e{I}b{I}a{I}y"),
        ("NAÏVE École A1B", f"{A}naÏ{A}ve École{C} a1{C}b"),
        (f"{C}the {E}A▁", f"{E}\ue015the {E}\ue018{C}a{E}\ue019"),
        ("", ""),
    ],
)
def test_what_text_becomes(text, folded):
    assert fold(text) == folded
    assert unfold(folded) == text


@settings(deadline=None, max_examples=300)
@given(texts)
def test_folding_can_be_undone(text):
    assert unfold(fold(text)) == text


@settings(deadline=None, max_examples=150)
@given(texts)
def test_every_character_but_a_marker_has_the_bytes_of_the_original(text):
    folded = fold(text)
    assert not re.search("[A-Z▁]", folded)
    assert len(re.sub(f"[{''.join(MARKERS)}]", "", folded).encode()) == len(text.encode())


@pytest.mark.parametrize("dangling", [C, f"a{I}", f"a{A} ", E, f"{E}x", f"{C}{A}1"])
def test_a_marker_with_nothing_to_mark_stands_for_nothing(dangling):
    assert unfold(dangling) == re.sub(f"[{''.join(MARKERS)}]", "", dangling)
