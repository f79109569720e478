"""Hints: a column's tokens, padded in front; what cannot be one is refused before any work."""

from typing import Any

import pytest

from dvpo.encoding import ChatEncoder
from dvpo.errors import InputError
from dvpo.privilege import Privilege
from dvpo.tasks import Example
from tiny_models import TOKENIZER

ENCODER = ChatEncoder(TOKENIZER)


def privilege(columns: dict[str, Any], column: str = "answer", room: int = 8) -> Privilege:
    return Privilege(column, ENCODER, [Example("p0", "x", columns)], room)


def test_a_hint_is_the_columns_text_and_a_line_end_padded_in_front_and_none_gives_no_token():
    hints_BH = privilege({"answer": 7}).hints({"answer": [7, 123, None]})
    texts = [TOKENIZER.decode([token for token in row if token >= 0]) for row in hints_BH.tolist()]
    assert texts == ["7\n", "123\n", ""]
    assert hints_BH.shape == (3, 4)
    assert [(row >= 0).tolist() for row in hints_BH] == [[False, False, True, True], [True] * 4, [False] * 4]


def test_a_batch_without_any_value_has_hints_of_no_width():
    assert privilege({"answer": None}).hints({"answer": [None, None]}).shape == (2, 0)


def test_a_column_that_an_example_lacks_is_refused_with_those_that_it_has():
    with pytest.raises(InputError, match=r"critic.privileged = answer is no column of example p0: take one of key"):
        privilege({"key": 1})


def test_a_hint_that_leaves_the_context_is_refused():
    privilege({"answer": "1234567"})  # and a line end: 8 tokens
    with pytest.raises(InputError, match=r"has 9 tokens in example p0, but prompt and response leave 8"):
        privilege({"answer": "12345678"})
