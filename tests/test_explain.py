"""`dvpo settings`: every setting says what it means and what it may be; one finds it by name or by meaning."""

import pytest

from dvpo.cli import main
from dvpo.config import Config
from dvpo.errors import InputError
from dvpo.explain import all_settings, settings_text


def test_every_setting_says_what_it_means_and_what_it_may_be():
    settings = list(all_settings(Config()))
    assert len(settings) > 150
    assert [each.name for each in settings if not (each.kind and each.value)] == []
    assert [each.name for each in settings if len(each.meaning) < 10] == []


def test_a_setting_is_found_by_its_name(capsys: pytest.CaptureFixture[str]):
    assert main(["settings", "advantage.lam"]) == 0
    assert capsys.readouterr().out == (
        "advantage.lam = 0.95\n"
        "    lambda of the advantages: 1 trusts the return alone, 0 the next value alone. (from 0 to 1)\n"
    )


def test_and_by_its_meaning_where_no_name_holds_the_word():
    assert settings_text(Config(), ["Huber zone"]).startswith("critic.kappa = 0.1\n    Width of the Huber zone")


def test_values_are_those_of_the_algorithm(capsys: pytest.CaptureFixture[str]):
    assert main(["settings", "weights.risk", "--algorithm", "dvpo_paper"]) == 0
    assert capsys.readouterr().out.startswith("critic.weights.risk = 0.1\n")


def test_a_word_that_nothing_holds_is_refused_with_the_sections():
    with pytest.raises(InputError, match=r"no setting's name or meaning holds zzz: try a section .*advantage"):
        settings_text(Config(), ["zzz"])
