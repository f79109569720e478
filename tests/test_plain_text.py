"""Whatever a model writes is shown and does nothing; figures are written in one way."""

import math
import sys

from hypothesis import given
from hypothesis import strategies as st

from dvpo.plain_text import clipped, duration, interval, percent, visible


def test_control_characters_become_their_pictures_and_colour_no_terminal():
    assert visible("\x1b[31mred\x1b[0m\x00\x7f") == "␛[31mred␛[0m␀␡"


def test_turners_of_direction_and_invisible_characters_show_their_code():
    assert visible("a\u202eb\u2067c\ufeff\x85\u2028") == "a\\u202eb\\u2067c\\ufeff\\u0085\\u2028"


def test_half_a_surrogate_pair_shows_its_code_and_can_be_written():
    assert visible("x\ud83dy").encode() == b"x\\ud83dy"


def test_lines_letters_of_any_script_and_joined_emoji_stay_as_they_are():
    text = "two\nlines\t\u0647\u0648 山 👩\u200d👩\u200d👧 é"
    assert visible(text) == text


@given(st.text(st.characters(max_codepoint=sys.maxunicode, exclude_categories=()), max_size=50))
def test_any_text_can_be_written_and_has_no_sign_that_acts(text: str):
    shown = visible(text)
    shown.encode()
    assert all(c.isprintable() or c in "\n\t\u200c\u200d" for c in shown)
    assert visible(shown) == shown


def test_a_long_text_says_how_much_of_it_is_missing():
    assert clipped("abcdef", 6) == "abcdef"
    assert clipped("a" * 2000, 3) == "aaa … (1,997 more characters)"


def test_a_duration_has_the_units_that_fit_it():
    assert [duration(x) for x in (3, 200, 12000)] == ["3 s", "3 min", "3 h 20 min"]


def test_shares_are_in_per_cent_and_what_is_not_known_is_a_dash_or_left_out():
    assert (percent(0.4534), percent(None)) == ("45.3%", "-")
    assert interval(0.4534, 0.386, 0.514) == "45.3 [39, 51]"
    assert interval(3.2, 2.868, 3.5, share=False) == "3.2 [2.87, 3.5]"
    assert interval(0.4534, None, 0.514) == interval(0.4534, 0.386, None) == "45.3"
    assert interval(None, 0.0, 1.0) == interval(math.nan, math.nan, math.nan) == "-"
