"""YAML from outside: plain values or one error, whatever stands in it, and at once."""

import time
from itertools import pairwise

import pytest
import yaml

from dvpo.safe_yaml import parse_yaml, problem

LEVELS = "abcdefghi"
BOMB = "a: &a [1]\n" + "".join(f"{key}: &{key} [{', '.join([f'*{before}'] * 9)}]\n" for before, key in pairwise(LEVELS))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: 1\nseed: 2\n", "at line 2 (the key 'seed' stands there twice)"),
        ("critic:\n  alpha: 0.1\n  alpha: 0.2\n", "at line 3 (the key 'alpha' stands there twice)"),
        ("output: x\nalgorithm dvpo\n\n\n", "at line 2 (could not find expected ':')"),
        ("output: 'x\nseed: 1\n", "at line 1 (found unexpected end of stream)"),
        (BOMB, "more than 100,000 values, those that aliases repeat included"),
        ("a: &a [*a]", "more than 100,000 values"),
        ("[" * 5000, "nested too deeply"),
        ("day: 2001-13-45", "month must be in 1..12"),
        ("seed: " + "9" * 5000, "4300 digits"),
        ('output: "a\\0b"', "NUL"),
        ('output: "\\ud800"', "half a surrogate pair"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a: [", "at line 1"),
    ],
)
def test_what_is_wrong_is_one_error_with_its_reason_and_at_once(text: str, words: str):
    start = time.monotonic()
    with pytest.raises(yaml.YAMLError) as refused:
        parse_yaml(text)
    assert words in problem(refused.value)
    assert time.monotonic() - start < 60


def test_aliases_and_merged_mappings_of_a_sensible_size_are_read():
    text = "one: &one {a: 1, b: 2}\ntwo: {<<: *one, b: 3}\nthree: [*one, *one]\n"
    one = {"a": 1, "b": 2}
    assert parse_yaml(text) == {"one": one, "two": {"a": 1, "b": 3}, "three": [one, one]}


def test_no_object_of_a_named_class_is_made(tmp_path):
    with pytest.raises(yaml.YAMLError):
        parse_yaml(f"!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [{tmp_path}/made]]")
    assert not (tmp_path / "made").exists()
