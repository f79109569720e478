"""The `noise` section: pseudo-labels, a list of models in YAML, and mistakes answered by one sentence."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from dvpo import Trainer
from dvpo.config import Config, differences, to_yaml
from dvpo.errors import InputError
from dvpo.loading import load_config
from dvpo.noise import make_noise, read_labels
from dvpo.noise_models import MODELS, OPTIONAL, PARAMETERS
from dvpo.sampling import Episode
from dvpo.scoring import Scorer
from dvpo.settings import NoiseConfig
from dvpo.tasks import Example
from dvpo.tasks.math import ChainArithmetic
from runs import Parity, run_config
from test_noise import OFF

# Pseudo-labels

LABELS = '{"id": "a", "answer": 5, "votes": 6, "samples": 8}\n\n{"id": "b", "answer": null, "votes": 0, "samples": 8}\n'
QUESTIONS = {name: Example(name, "2+2=", {"answer": 4}) for name in "abc"}


def labelled(tmp_path: Path, text: str = LABELS) -> NoiseConfig:
    path = tmp_path / "labels.jsonl"
    path.write_text(text)
    return NoiseConfig(kind="pseudo_labels", path=str(path))


def answered(name: str, text: str) -> Episode:
    made = Episode(QUESTIONS[name], 0, 0, [9], tokens=[1, 2], turns=[0, 0])
    made.turn_rewards, made.messages = [None], [{"role": "assistant", "content": text}]
    return made


def test_pseudo_labels_judge_by_their_own_answer_and_the_truth_stays_what_it_is(tmp_path: Path) -> None:
    noise = make_noise(labelled(tmp_path), 0, list(QUESTIONS.values()))
    scored = Scorer(ChainArithmetic(train=1, id=1, ood=1), None, noise)(
        [answered("a", "#4"), answered("a", "#5"), answered("b", "#4"), answered("c", "#4")]
    )
    assert scored.fields["true_B"].tolist() == [1, 0, 1, 1]
    assert scored.fields["rewarded_B"].tolist() == [True, True, False, False]  # b and c have no label: no reward
    assert scored.fields["observed_B"][:2].tolist() == [0, 1]


def test_a_reward_function_of_one_s_own_is_asked_with_the_pseudo_label(tmp_path: Path) -> None:
    asked: list[Any] = []

    class Reward:
        def __call__(self, prompts: Any, completions: Any, ids: Any, columns: Any) -> Any:
            asked.append(columns["answer"])
            return type("Scores", (), {"rewards": [0.25] * len(prompts), "faults": []})

    noise = make_noise(labelled(tmp_path), 0)
    scorer = Scorer(ChainArithmetic(train=1, id=1, ood=1), Reward(), noise)  # type: ignore[arg-type]
    assert scorer([answered("a", "#4")]).fields["observed_B"].tolist() == [0.25]
    scorer.judge([answered("a", "#4")])
    assert asked == [[5]]
    scorer.task = ChainArithmetic(train=1, id=1, ood=1)
    scorer.task.true_reward = lambda prompts, *_, **__: [None] * len(prompts)  # type: ignore[method-assign]
    scorer.task.knows_truth = False  # type: ignore[attr-defined]
    scorer.judge([answered("a", "#4")])  # nobody knows the truth: evaluations ask too, with the answer of the data
    assert asked == [[5], [4]]


def test_other_noise_comes_on_top_of_pseudo_labels(tmp_path: Path) -> None:
    first = labelled(tmp_path)
    flips = [{"kind": "flip", "rate": 1}]
    noise = make_noise(load_config({"noise": {"kind": first.kind, "path": first.path, "then": flips}}).noise, 0)
    assert noise([1.0, 0.0, 1.0], ["a", "a", "c"], [0] * 3, [0, 1, 0], [[]] * 3) == [0.0, 1.0, None]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "line 1 is [1]; write one JSON object a line"),
        ('{"id": "a", "answer": 1}\n{oops', "line 2 is no JSON ("),
        ('{"id": 3, "answer": 1}', "line 1 is no JSON object"),
        ('{"id": "a"}', "line 1 is no JSON object"),
        ('{"id": "a", "answer": 1}\n{"id": "a", "answer": 2}', "line 2 labels 'a' again"),
        ('{"id": "z", "answer": 1}', "labels none of the 3 training prompts"),
        ("", "labels none of the 3 training prompts"),
    ],
)
def test_wrong_label_files_are_refused_in_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=r"^noise.path(:| =) .*labels.jsonl") as caught:
        make_noise(labelled(tmp_path, text), 0, list(QUESTIONS.values()))
    assert message in str(caught.value)


def test_labels_that_are_not_there_and_tasks_without_answers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"noise.path = .*none.jsonl cannot be read \(No such file or directory\)"):
        read_labels(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match=r"noise.kind = pseudo_labels replaces the column `answer`, which no training"):
        make_noise(labelled(tmp_path), 0, [Example("a", "hello", {"level": 3})])


def test_labels_of_another_type_than_the_column_are_refused_with_both(tmp_path: Path) -> None:
    train = [Example("a", "40+42=", {"answer": 82}), Example("b", "0.5+0=", {"answer": 0.5}), Example("c", "?", {})]
    with pytest.raises(InputError, match=r"labels 'a' with '82', a str, where the column `answer` holds number, which"):
        make_noise(labelled(tmp_path, '{"id": "a", "answer": "82"}'), 0, train)
    make_noise(labelled(tmp_path, '{"id": "a", "answer": 82.0}'), 0, train)


# Settings


def test_yaml_keeps_a_list_of_noises_and_the_old_form() -> None:
    more = "noise.then=[{kind: gaussian, sd: 0.3}, {kind: missing, rate: 0.1}]"
    config = load_config({"noise": {"kind": "flip", "rate": 0.2}}, [more])
    assert (config.noise.kind, config.noise.rate) == ("flip", 0.2)
    assert [(m.kind, m.sd, m.rate) for m in config.noise.then] == [("gaussian", 0.3, None), ("missing", None, 0.1)]
    assert load_config(yaml.safe_load(to_yaml(config))) == config
    assert differences(config, load_config()).keys() == {"noise.kind", "noise.rate", "noise.then"}


def test_an_override_to_none_switches_a_noise_off_whatever_else_stands_there() -> None:
    noise = load_config({"noise": {"kind": "gaussian", "sd": 0.5}}, ["noise.kind=none"]).noise
    assert make_noise(noise, 0).models == ()


def metrics(config: Config) -> list[dict[str, Any]]:
    Trainer(config, task=Parity()).train()
    rows = map(json.loads, (Path(config.output) / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


def test_a_run_with_every_kind_switched_off_in_one_list_is_the_clean_run_bit_for_bit(tmp_path: Path) -> None:
    off = ["noise.kind=none", f"noise.then={json.dumps([{'kind': kind, **rest} for kind, rest in OFF.items()])}"]
    on = ["noise.kind=none", "noise.then=[{kind: gaussian, sd: 0.1}]"]
    clean, same, other = (metrics(run_config(tmp_path / n, *o)) for n, o in (("a", []), ("b", off), ("c", on)))
    assert same == clean
    assert other != clean


def test_every_setting_of_a_model_is_a_setting_of_the_section() -> None:
    known = {name for name in NoiseConfig.__dataclass_fields__ if name not in ("kind", "seed", "then")}
    assert {name for takes in (*PARAMETERS.values(), *OPTIONAL.values()) for name in takes} == known
    assert PARAMETERS.keys() == MODELS.keys() | {"none", "pseudo_labels"}


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        ({"kind": "flop"}, "noise.kind = 'flop' is not valid: did you mean flip?"),
        ({"kind": "zzz"}, "noise.kind = 'zzz' is not valid: take one of none, pseudo_labels, flip,"),
        ({"kind": "flip", "rate": -0.1}, "noise.rate = -0.1 is not valid: input should be greater than or equal to 0"),
        ({"kind": "flip", "rate": 1.5}, "noise.rate = 1.5 is not valid"),
        ({"kind": "flip", "rate": math.nan}, "noise.rate = nan is not valid"),
        ({"kind": "flip"}, "flip needs rate: set it"),
        ({"kind": "asymmetric"}, "asymmetric needs false_positive and false_negative: set it"),
        ({"kind": "gaussian", "sd": 1, "rate": 0.2}, "gaussian has no rate, it takes sd: leave the others out"),
        ({"kind": "missing", "rate": 0.2, "low": -1}, "missing has no low, it takes rate"),
        ({"kind": "gaussian", "sd": -1}, "noise.sd = -1 is not valid"),
        ({"kind": "gaussian", "sd": math.inf}, "noise.sd = inf is not valid"),
        ({"kind": "student_t", "df": 0.5, "scale": 1}, "noise.df = 0.5 is not valid"),
        (
            {"kind": "reward_model", "accuracy": 0.5},
            "noise.accuracy = 0.5 is not valid: input should be greater",
        ),
        ({"kind": "reward_model", "accuracy": 72}, "noise.accuracy = 72 is not valid"),
        ({"kind": "affine", "offset_sd": 1, "scale_sd": 11}, "noise.scale_sd = 11 is not valid"),
        ({"kind": "flip", "rate": 0.1, "by": "kind"}, "flip has no by, it takes rate, low, high: leave"),
        ({"kind": "flip", "rate": 0.1, "low": 1, "high": 1}, "low = 1.0 is not below high = 1.0"),
        ({"kind": "flip", "rate": 0.1, "high": math.inf}, "noise.high = inf is not valid"),
        ({"kind": "pseudo_labels"}, "pseudo_labels needs path"),
        ({"then": [{"kind": "pseudo_labels", "path": "x"}]}, "pseudo_labels come first"),
        ({"then": [{"kind": "flop"}]}, "noise.then.0.kind = 'flop' is not valid: did you mean flip?"),
        (
            {"then": [{"kind": "none"}, {"kind": "flip"}]},
            "noise.then.1 = {'kind': 'flip'} is not valid: flip needs",
        ),
        ({"then": [{"knd": "flip"}]}, "unknown config key noise.then.0.knd: did you mean noise.then.0.kind?"),
        ({"then": {"kind": "flip"}}, "noise.then = {'kind': 'flip'} is not valid: input should be a valid list"),
        ({"then": [3]}, "noise.then.0 = 3 is not valid"),
        ([{"kind": "flip", "rate": 0.1}], "is a section"),
    ],
)
def test_wrong_settings_are_refused_in_one_sentence(noise: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config({"noise": noise})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
