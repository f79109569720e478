"""Configs: the published defaults, who wins over whom, and every mistake answered by one sentence."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from dvpo.algorithms import ALGORITHMS
from dvpo.config import Config, differences, to_yaml
from dvpo.errors import InputError
from dvpo.loading import load_config
from dvpo.nested import merge

TERMS = ("risk", "cvar", "gain", "shift", "shape", "curvature", "consistency")


def written(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def refusal(source: Any = None, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load_config(source, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Values


def test_the_dialogue_task_brings_the_lengths_of_its_conversations_and_what_is_said_wins():
    talk = load_config(None, ["task.name=dialogue"]).sampling
    assert (talk.max_prompt_length, talk.max_completion_length) == (128, 256)
    own = load_config({"task": {"name": "dialogue"}}, ["sampling.max_completion_length=99"]).sampling
    assert own == dataclasses.replace(talk, max_completion_length=99)
    assert load_config({"task": {"name": "science"}}).sampling == load_config().sampling


def test_the_defaults_of_the_embedded_task_are_those_of_section_7_of_the_method():
    config = load_config()
    advantage, critic, actor = config.advantage, config.critic, config.actor
    assert (advantage.gamma, advantage.lam, advantage.critic_lam) == (1.0, 0.95, None)
    assert (advantage.target, advantage.truncation, advantage.missing_reward) == ("indexwise", "terminal", "mask")
    assert (critic.num_heads, critic.num_quantiles, critic.levels) == (3, 32, "midpoint")
    assert (critic.kappa, critic.eta, critic.alpha, critic.beta) == (0.1, 2.0, 0.1, 0.1)
    assert critic.value_clip == 0.5
    assert {getattr(critic.weights, term) for term in TERMS} == {0.0}
    assert {getattr(load_config(None, ["algorithm=dvpo_paper"]).critic.weights, term) for term in TERMS} == {0.1}
    assert advantage.law.functional == "rank"
    assert (actor.clip_low, actor.clip_high, actor.kl.coef, actor.entropy_coef) == (0.2, 0.2, 0.0, 0.0)
    assert (config.update.epochs, config.update.minibatches) == (1, 2)
    assert (config.sampling.prompts_per_step, config.sampling.samples_per_prompt) == (16, 8)
    assert (config.sampling.top_p, config.sampling.top_k) == (1.0, 0)


def test_both_rows_share_every_setting_but_their_critic_and_what_is_read_off_its_law():
    assert set(differences(load_config(), load_config(None, ["algorithm=ppo"]))) == {
        "algorithm",
        "critic.num_heads",
        "advantage.law.functional",
    }
    assert load_config(None, ["algorithm=ppo"]).critic.num_heads == 1


def test_a_setting_of_a_section_moves_no_other():
    sections = [field.default for field in dataclasses.fields(Config) if dataclasses.is_dataclass(field.default)]
    assert len(sections) > 10
    for section in sections:
        assert section == type(section)()
    assert load_config({"critic_optimiser": {"warmup_steps": 10}}).critic_optimiser.lr == 1e-3
    assert load_config({"critic_optimiser": None}).critic_optimiser.lr == 1e-3


def test_a_heading_with_nothing_below_it_leaves_what_it_is_laid_over(tmp_path: Path):
    assert merge({"critic": {"alpha": 0.2}, "seed": 3}, {"critic": None}) == {"critic": {"alpha": 0.2}, "seed": 3}
    assert merge({"reward": {"clip": 1.0}}, {"reward": {"clip": None}}) == {"reward": {"clip": None}}
    (tmp_path / "c.yaml").write_text("critic:\n  # alpha: .1\n")
    assert load_config(tmp_path / "c.yaml", ["critic.alpha=0.2"]).critic.alpha == 0.2


def test_an_override_that_yaml_would_cut_at_a_comment_is_refused():
    for override in (r"task.answer_pattern=#(\d+)", "output=runs/exp #2"):
        assert "YAML reads what follows # as a comment" in refusal(None, override)
    quoted = ["task.name=files", "task.path=mine.jsonl", r"task.answer_pattern='#(\d+)'"]
    assert load_config(overrides=quoted).task.answer_pattern == r"#(\d+)"


def test_a_mix_is_a_list_or_a_tuple():
    parts = [{"name": "math"}, {"name": "dialogue"}]
    configs = [load_config({"task": {"name": "mix", "mix": mix}}) for mix in (parts, tuple(parts))]
    assert configs[0] == configs[1]
    assert configs[0].sampling.max_completion_length == 256
    assert "unknown config key task.mix.0.wieght" in refusal({"task": {"mix": ({"name": "math", "wieght": 2},)}})


@pytest.mark.parametrize("mix", [[], ["math", "science"]])
def test_a_mix_of_nothing_or_of_names_is_refused_in_a_sentence(mix: list[str]):
    assert "task.mix" in refusal({"task": {"name": "mix", "mix": mix}})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["algorithm=grpo", "sampling.samples_per_prompt=1"], "algorithm = grpo compares the responses to one prompt"),
        (["algorithm=ppo", "reward.norm=group", "sampling.samples_per_prompt=1"], "reward.norm = group compares"),
        (["advantage.reward_trust=0.5", "advantage.target=mixture"], "moves the atoms of a rank one by one"),
        (
            ["algorithm=dvpo_cons", "critic.adaptive_risk=true", "reward.trusted=0.1"],
            "critic.adaptive_risk = true moves the tail terms, whose weights are 0",
        ),
    ],
)
def test_settings_that_would_do_nothing_together_are_refused(settings: list[str], words: str):
    assert words in refusal(None, *settings)
    assert load_config(overrides=["algorithm=reinforce_pp", "sampling.samples_per_prompt=1"])


def test_yamls_word_for_off_is_taken_where_a_setting_has_it(tmp_path: Path):
    (tmp_path / "c.yaml").write_text("sampling: {correction: {kind: off}}\n")
    assert load_config(tmp_path / "c.yaml").sampling.correction.kind == "off"
    assert load_config(overrides=["sampling.correction.kind=off"]).sampling.correction.kind == "off"
    with pytest.raises(InputError, match=r"sampling\.correction\.kind = True is not valid: it is no yes-or-no setting"):
        load_config(overrides=["sampling.correction.kind=on"])


def test_the_row_wins_over_the_defaults_the_file_over_the_row_and_the_override_over_the_file(tmp_path: Path):
    file = written(tmp_path, "algorithm: dvpo_paper\ncritic: {weights: {cvar: 0.5, gain: 0.6}}")
    config = load_config(file, ["critic.weights.gain=0.7"])
    assert Config().critic.weights.cvar == 0.0
    assert load_config(None, ["algorithm=dvpo_paper"]).critic.weights.cvar == 0.1
    assert (config.critic.weights.cvar, config.critic.weights.gain, config.critic.weights.shift) == (0.5, 0.7, 0.1)


def test_of_two_overrides_the_last_wins_and_the_source_mapping_is_left_alone():
    source: dict[str, Any] = {"critic": {"alpha": 0.3}}
    assert load_config(source, ["critic.alpha=0.2", "critic.alpha=0.25"]).critic.alpha == 0.25
    assert source == {"critic": {"alpha": 0.3}}


def test_the_row_named_by_an_override_brings_its_own_defaults(tmp_path: Path):
    file = written(tmp_path, "algorithm: dvpo_paper")
    assert load_config(file, ["algorithm=ppo"]).critic.weights.cvar == 0.0


def test_exponents_without_a_point_which_yaml_reads_as_text_are_numbers(tmp_path: Path):
    assert load_config(written(tmp_path, "policy_optimiser: {lr: 1e-4}")).policy_optimiser.lr == 1e-4
    assert load_config(None, ["critic_optimiser.lr=2e-5"]).critic_optimiser.lr == 2e-5


def test_an_empty_file_and_a_heading_with_nothing_below_it_mean_the_defaults(tmp_path: Path):
    assert load_config(written(tmp_path, "")) == load_config()
    assert load_config(written(tmp_path, "critic:\n  # alpha: 0.2\nactor: {kl: }\n")) == load_config()


def test_yaml_out_and_in_again_gives_an_equal_config(tmp_path: Path):
    for overrides in ([], ["algorithm=ppo"], ["sampling.stop=['\\n', 'Q:']", "critic.value_clip=null", "steps=7"]):
        config = load_config(None, overrides)
        text = to_yaml(config)
        assert load_config(written(tmp_path, text)) == config
        assert text == yaml.safe_dump(yaml.safe_load(text), sort_keys=False)  # whichever dumper wrote it


def test_differences_name_each_key_with_both_values():
    one, other = load_config(None, ["seed=1", "actor.kl.coef=0.5"]), load_config()
    assert differences(one, other) == {"seed": (1, 0), "actor.kl.coef": (0.5, 0.0)}
    assert differences(one, one) == {}


def test_a_config_cannot_be_changed_after_it_was_checked():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_config().critic.alpha = 7.0  # type: ignore[misc]


def test_a_config_made_in_python_is_checked_too():
    with pytest.raises(ValueError, match="less than or equal to 1"):
        dataclasses.replace(load_config().critic, alpha=7.0)


def test_one_quantile_is_fine_while_the_tail_terms_are_off():
    off = [f"critic.weights.{term}=0" for term in TERMS if term not in ("shift", "consistency")]
    assert load_config(None, ["critic.num_quantiles=1", *off]).critic.num_quantiles == 1
    assert load_config(None, ["critic.num_quantiles=1", "algorithm=ppo"]).critic.num_quantiles == 1


def test_every_rows_defaults_are_settings_that_exist():
    for name in ALGORITHMS:
        assert load_config(None, [f"algorithm={name}"]).algorithm == name


# Mistakes


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("sed=3", "did you mean seed?"),
        ("critic.alhpa=0.1", "did you mean critic.alpha?"),
        ("critic.weights.cvr=0.1", "did you mean critic.weights.cvar?"),
        ("critics.alpha=0.1", "did you mean critic?"),
        ("critic.lam=0.9", "did you mean advantage.lam?"),
        ("alpha=0.1", "did you mean critic.alpha?"),
        ("critic.cvar=0.1", "did you mean critic.weights.cvar?"),
        ("actor.warmup_step=3", "did you mean"),
        ("zzz=1", "the keys here are actor, advantage, alarms, algorithm"),
        ("sampling={prompts_per_step:4}", "per_step:4: write a space behind the colon, prompts_per_step: 4"),
    ],
)
def test_an_unknown_key_is_answered_with_the_near_one_of_its_section_or_of_another(override: str, suggestion: str):
    message = refusal(None, override)
    assert message.startswith(f"unknown config key {override.partition('.')[0].partition('=')[0]}")
    assert suggestion in message


def test_an_unknown_key_in_a_file_is_refused_like_one_in_an_override(tmp_path: Path):
    assert refusal(written(tmp_path, "critic: {alhpa: 0.1}")) == refusal(None, "critic.alhpa=0.1")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("critic.alpha=0", "critic.alpha = 0 is not valid: input should be greater than 0"),
        ("critic.alpha=1.5", "critic.alpha = 1.5 is not valid: input should be less than or equal to 1"),
        ("critic.alpha=.nan", "critic.alpha = nan is not valid"),
        ("critic.kappa=.inf", "critic.kappa = inf is not valid: input should be a finite number"),
        ("advantage.gamma=1.01", "advantage.gamma = 1.01 is not valid"),
        ("steps=0", "steps = 0 is not valid: input should be greater than or equal to 1"),
        ("steps=1.5", "steps = 1.5 is not valid: input should be a valid integer"),
        ("steps=many", "steps = 'many' is not valid: input should be a valid integer"),
        ("steps=yes", "steps = True is not valid: it is no yes-or-no setting"),
        ("critic.alpha=off", "critic.alpha = False is not valid: it is no yes-or-no setting"),
        ("critic.monotone=3", "critic.monotone = 3 is not valid"),
        ("critic.alpha=[0.1]", "critic.alpha = [0.1] is not valid"),
        ("sampling.stop=Q", "sampling.stop = 'Q' is not valid: input should be a valid list"),
        ("noise.kind=flop", "noise.kind = 'flop' is not valid: did you mean flip?"),
        ("critic=3", "config key critic = 3 is a section: write critic.key=value, in a file critic: {key: value}"),
        ("task=files", "is a section: write task.name='files', in a file task: {name: 'files'}"),
        ("actor.kl=0.1", "is a section: write actor.kl.key=value, in a file kl: {key: value}"),
        ("update.minibatches=129", "update.minibatches = 129 exceeds the 128 responses of a step"),
        ("task.name=files", "task.path is empty"),
        (
            "task.ood=untrained",
            "task.ood = untrained is a setting of science and dialogue, but task.name = math: set that to science or",
        ),
        ("algorithm=dvop", "algorithm = dvop is unknown: did you mean dvpo?"),
        ("algorithm=DVPO", "algorithm = DVPO is unknown: did you mean dvpo?"),
        ("noise.kind=FLIP", "noise.kind = 'FLIP' is not valid: did you mean flip?"),
        ("reward.trusted=20", "reward.trusted = 20 is not valid: input should be less than or equal to 1 (a share: 2"),
        ("reward.timeout=2s", "unable to parse string as a number (a number of seconds)"),
        ("algorithm=[dvpo]", "algorithm = ['dvpo'] is not a name"),
        ("critic.alpha", "override 'critic.alpha' has no `key=value` form"),
        ("=3", "override '=3' has no `key=value` form"),
        ("seed=4294967296", "seed = 4294967296 is not valid: input should be less than 4294967296"),
        ("alarms.window=1", "alarms.window = 1 shows no spread to hold a change against: take 2 or more"),
        ("alarms.stop=[klll]", "alarms.stop.0 = 'klll' is not valid: input should be 'entropy', 'kl', 'value'"),
        ("reward.workers=0", "reward.workers = 0 is not valid"),
        ("output={a: 1, a: 2}", "the value is not valid YAML at line 1 (the key 'a' stands there twice); quote it"),
        ("sampling.stop=[a", "override 'sampling.stop=[a': the value is not valid YAML"),
        ("seed.x=1", "seed = {'x': 1} is not valid"),
    ],
)
def test_a_wrong_value_is_answered_with_field_value_and_what_is_wanted(override: str, words: str):
    assert words in refusal(None, override)


@pytest.mark.parametrize("count", [1, 2])
def test_tail_terms_want_three_quantiles(count: int):
    words = f"critic.num_quantiles = {count} is too few for tail terms: take at least 3, or set the"
    assert words in refusal(None, "algorithm=dvpo_paper", f"critic.num_quantiles={count}")
    assert load_config(None, [f"critic.num_quantiles={count}"]).critic.num_quantiles == count


def test_several_wrong_values_are_named_at_once():
    message = refusal(None, "critic.alpha=2", "steps=0")
    assert "critic.alpha = 2" in message
    assert "steps = 0" in message


def test_an_override_below_a_value_of_the_file_is_refused(tmp_path: Path):
    assert "'seed' is a value and holds no 'x'" in refusal(written(tmp_path, "seed: 3"), "seed.x=1")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"- a\n- b\n", "holds a list: it must hold `key: value` lines"),
        (b"seed", "holds a str"),
        (
            b"seed: 1\ncritic: {alpha: [0.1\n",
            "is not valid YAML at line 3 (expected ',' or ']', but got '<stream end>'): mend",
        ),
        (b"seed:\t1\n\tsteps: 3\n", "is not valid YAML at line 1"),
        (b"output: \xff\n", "cannot be read (it is not UTF-8 text)"),
        (b"3: 4\n", "unknown config key 3"),
    ],
    ids=["a list", "a word", "an open bracket", "a tab", "not UTF-8", "a number as key"],
)
def test_a_file_that_is_no_config_is_refused_with_its_name_and_reason(tmp_path: Path, content: bytes, words: str):
    (tmp_path / "config.yaml").write_bytes(content)
    assert words in refusal(tmp_path / "config.yaml")


def test_a_study_is_no_config_and_a_config_with_a_misspelt_key_is_no_study(tmp_path: Path):
    study = "output: runs/x\nconfig: {steps: 3}\ntasks: {math: {}}\nalgorithms: [ppo]\nsteps: 3\n"
    assert refusal(written(tmp_path, study)).endswith(
        "config.yaml is a study, no run's config: dvpo study " + str(tmp_path / "config.yaml")
    )
    assert "unknown config key seeds: did you mean seed?" in refusal(written(tmp_path, "seeds: 3\nsteps: 5\n"))


def test_a_file_that_is_not_there_is_refused(tmp_path: Path):
    assert refusal(tmp_path / "no.yaml").endswith("no.yaml cannot be read (No such file or directory): check the path")
    assert "cannot be read (Is a directory)" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("advantage.missing_reward=bootstrap", "asks a critic, but algorithm = grpo has none"),
        ("advantage.truncation=bootstrap", "asks a critic, but algorithm = grpo has none"),
        ("policy_optimiser.betas=[0.9, 1.0]", "policy_optimiser.betas.1 = 1.0 is not valid"),
    ],
)
def test_a_setting_that_could_mean_nothing_is_refused(override: str, words: str):
    with pytest.raises(InputError, match=words):
        load_config({"algorithm": "grpo"}, [override])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["policy_optimiser.warmup_steps=5", "update.actor_warmup_steps=5"], "end while the policy still rests"),
        (["alarms.kl_reference=1"], "watches what is measured only where actor.kl.coef is above 0"),
        (["alarms.stop=[hacking]", "alarms.window=0"], "alarms.stop names hacking, which is switched off by 0"),
        (["alarms.stop=[kl]", "alarms.kl=0"], "alarms.stop names kl, which is switched off by 0"),
        (["alarms.stop=[value]", "algorithm=grpo"], "which cannot ring: algorithm = grpo has no critic; drop it"),
        (
            ["alarms.stop=[kl]", "update.epochs=1", "update.minibatches=1"],
            "which cannot ring: a step of one update (update.epochs, update.minibatches) is measured before it",
        ),
        (["task.path=mine.jsonl"], "task.path = mine.jsonl is a setting of files, but task.name = math"),
        (["task.name=files", "task.path=a.jsonl", "task.generators=[gcd]"], "is a setting of reasoning_gym, but"),
        (["noise.rate=0.4"], "noise.rate = 0.4 belongs to a kind of noise: set noise.kind"),
        (["advantage.doubt_steps=5"], "lets advantage.reward_trust grow to 1, where it stands"),
        (["critic.lora.alpha=2"], "critic.lora.alpha is set, but the critic has no adapters"),
    ],
)
def test_settings_that_together_mean_nothing_are_refused(overrides: list[str], words: str):
    assert words in refusal(None, *overrides)


def test_what_a_setting_is_given_to_is_not_refused():
    assert load_config({"task": {"name": "my_module:make_task", "path": "mine.jsonl"}}).task.path == "mine.jsonl"
    assert load_config({"noise": {"kind": "none", "rate": 0.4}}).noise.rate == 0.4  # switched off by name
    sizes = ["sampling.prompts_per_step=2", "sampling.samples_per_prompt=2", "update.minibatches=4"]
    assert load_config(None, sizes).update.minibatches == 4  # a response each
    stop = ["alarms.stop=[kl]", "update.epochs=1", "update.minibatches=1"]
    assert load_config(None, [*stop, "alarms.kl_reference=1", "actor.kl.coef=1e-6"]).alarms.stop == ("kl",)


def test_clipped_deltas_are_refused_where_there_is_no_critic():
    for row in (name for name, row in ALGORITHMS.items() if not row.has_critic):
        words = f"advantage.delta_clip = 0.5 clips .*, but algorithm = {row} has no critic: set it to null"
        with pytest.raises(InputError, match=words):
            load_config({"algorithm": row}, ["advantage.delta_clip=0.5"])


@pytest.mark.parametrize("row", ["dvpo_plain", "ppo", "grpo"])
def test_a_floor_is_refused_where_the_advantage_is_no_rank(row: str):
    words = r"advantage\.law\.floor = 0\.3 is that of a rank.*functional = mean: set it to 0"
    with pytest.raises(InputError, match=words):
        load_config({"algorithm": row}, ["advantage.law.floor=0.3"])


def test_clipped_deltas_are_refused_where_the_advantage_is_a_rank():
    with pytest.raises(InputError, match="clips nothing in a rank"):
        load_config({"algorithm": "dvpo_rank"}, ["advantage.delta_clip=1"])


@pytest.mark.parametrize("setting", ["advantage.law.functional=cvar", "advantage.target=mixture"])
def test_a_setting_of_the_law_is_refused_where_there_is_no_law(setting: str):
    assert load_config({"algorithm": "ppo_hl_gauss"}, [setting])
    for row in ("ppo", "grpo"):
        with pytest.raises(InputError, match=f"reads a law of returns, which algorithm = {row} does not learn"):
            load_config({"algorithm": row}, [setting])
