"""The parts of the verl plug-in that need no verl; those that do are in `with_verl/` (`make test-verl`)."""

import dataclasses
import inspect
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from dvpo.core.returns import distributional_gae
from dvpo.core.risk import cvar
from dvpo.critic import load_critic
from dvpo.errors import InputError
from dvpo.integrations.verl import check
from dvpo.integrations.verl import prepare as prepare_module
from dvpo.integrations.verl.objective import make_objective, same_rows, state_places
from dvpo.integrations.verl.prepare import main, packaged_settings, prepare
from dvpo.reward_model import make_reward_model, open_reward_model
from dvpo.settings_learning import AdvantageConfig, CriticConfig
from runs import model_folder

ROOT = Path(__file__).parents[1]


def objective(gamma: float = 0.9, lam: float = 0.8, **settings: Any):
    critic = {"num_heads": 2, "num_quantiles": 4, **settings.pop("critic", {})}
    return make_objective({"critic": critic, **settings}, gamma, lam)


# Where states stand.


@pytest.mark.parametrize("stride", [None, 9])
def test_the_state_of_a_response_token_is_the_token_before_it(stride: int | None):
    prompts, responses = [3, 1, 4], [2, 5, 1]
    lengths = [p + r for p, r in zip(prompts, responses, strict=True)]
    starts = [0, 5, 11] if stride is None else [0, 9, 18]
    expected = [
        start + prompt - 1 + t
        for start, prompt, response in zip(starts, prompts, responses, strict=True)
        for t in range(response)
    ]
    assert state_places(torch.tensor(lengths), torch.tensor(responses), stride).tolist() == expected


def test_batches_are_the_same_if_they_hold_the_same_rows_in_the_same_order():
    rows = [torch.tensor([1, 2]), torch.tensor([3])]
    assert same_rows(rows, [row.clone() for row in rows])
    for other in (rows[::-1], rows[:1], [torch.tensor([1, 2]), torch.tensor([4])]):
        assert not same_rows(rows, other)


# Values, targets, loss.


@pytest.mark.parametrize(("target", "atoms"), [("indexwise", 4), ("mixture", 7)])
def test_a_padding_row_has_no_targets_of_the_width_that_others_have(target: str, atoms: int):
    given = objective(advantage={"target": target, "target_atoms": 7})
    rewards_T, ensemble_TM = torch.zeros(3), torch.rand(3, 4)
    of_both = [
        given.targets(rewards_T, ensemble_TM, mask_T, torch.arange(3)) for mask_T in (torch.ones(3), torch.zeros(3))
    ]
    assert [tuple(one.shape) for one in of_both] == [(3, atoms), (0, atoms)]


def test_the_value_is_the_mean_of_the_ensemble_or_what_the_law_is_asked_for():
    theta_KNM = torch.randn(5, 2, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(objective().values(theta_KNM), theta_KNM.mean(dim=(1, 2)))
    careful = objective(advantage={"law": {"functional": "cvar", "lower": 0.5}})
    torch.testing.assert_close(careful.values(theta_KNM), cvar(theta_KNM.mean(dim=1), 0.5))


def one_response() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Six tokens, of which two are a tool's, with a reward in the middle and one at the end."""
    ensemble_TM = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    return torch.tensor([0, 0.5, 0, 0, 0, 1.0]), ensemble_TM, torch.tensor([1, 1, 0, 0, 1, 1]), torch.arange(6)


def test_targets_are_those_of_distributional_gae_with_the_critics_own_lambda():
    rewards_T, ensemble_TM, mask_T, tokens_T = one_response()
    ours_KM = objective(advantage={"critic_lam": 0.3}).targets(rewards_T, ensemble_TM, mask_T, tokens_T)
    sorted_TM = ensemble_TM.sort(dim=-1).values
    rows = [tensor[None] for tensor in (rewards_T, sorted_TM, mask_T.bool())]
    _, targets_BTM = distributional_gae(*rows, 0.9, 0.3)
    torch.testing.assert_close(ours_KM, targets_BTM[0][mask_T.bool()])
    _, wrong_BTM = distributional_gae(*rows, 0.9, 0.8)
    assert not torch.allclose(ours_KM, wrong_BTM[0][mask_T.bool()], atol=0.01)


def test_what_stands_at_masked_tokens_reaches_no_target():
    rewards_T, ensemble_TM, mask_T, tokens_T = one_response()
    expected_KM = objective().targets(rewards_T, ensemble_TM, mask_T, tokens_T)
    ensemble_TM[2:4] = torch.nan
    rewards_T[2] = 7.0
    assert torch.equal(objective().targets(rewards_T, ensemble_TM, mask_T, tokens_T), expected_KM)
    assert objective().targets(rewards_T, ensemble_TM, torch.zeros(6), tokens_T).shape == (0, 4)


def test_draws_of_mixture_targets_are_keyed_by_the_response():
    rewards_T, ensemble_TM, mask_T, tokens_T = one_response()
    mixture = objective(advantage={"target": "mixture", "target_atoms": 8})
    first, again = (mixture.targets(rewards_T, ensemble_TM, mask_T, tokens_T) for _ in range(2))
    assert first.shape == (4, 8)
    assert torch.equal(first, again)
    assert not torch.equal(first, mixture.targets(rewards_T, ensemble_TM, mask_T, tokens_T + 1))


def test_the_loss_of_no_token_is_0_and_has_a_gradient():
    predictions_KNM = torch.randn(3, 2, 4, requires_grad=True)
    nothing = torch.zeros(3, dtype=torch.bool)
    loss = objective().loss(predictions_KNM[nothing], torch.zeros(0, 4))["loss"].sum()
    loss.backward()
    assert (float(loss.detach()), float(predictions_KNM.grad.abs().sum())) == (0, 0)


def test_values_and_losses_are_float32_within_the_autocast_that_verl_calls_them_from():
    theta_KNM = torch.randn(5, 2, 4, generator=torch.Generator().manual_seed(0))
    targets_KL = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    expected = {"value": objective().values(theta_KNM), **objective().loss(theta_KNM, targets_KL)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = {"value": objective().values(theta_KNM), **objective().loss(theta_KNM, targets_KL)}
        assert (theta_KNM @ theta_KNM.mT).dtype == torch.bfloat16
    for name, tensor_K in expected.items():
        assert torch.equal(found[name], tensor_K), name


# Settings.


def test_the_packaged_settings_are_an_objective_of_the_papers_size():
    config = make_objective(packaged_settings(), gamma=1.0, lam=0.95).config
    assert (config.algorithm, config.critic.num_heads, config.critic.num_quantiles) == ("dvpo_paper", 3, 200)


def test_the_packaged_config_names_the_mode_and_where_verls_own_config_is():
    config = yaml.safe_load((ROOT / "src/dvpo/integrations/verl/config/dvpo.yaml").read_text())
    assert config["hydra"]["searchpath"] == ["pkg://verl.trainer.config"]
    assert config["trainer"]["v1"]["trainer_mode"] == "dvpo"
    assert (config["algorithm"]["adv_estimator"], config["critic"]["strategy"]) == ("gae", "fsdp2")


def test_the_package_has_the_entry_point_that_verl_looks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (module,) = project["entry-points"]["verl.plugins"].values()
    assert (ROOT / "src" / Path(*module.split("."))).with_suffix(".py").exists()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"algorithm": "ppo"}, "dvpo.algorithm = ppo has a scalar critic"),
        ({"actor": {}}, "dvpo.actor means nothing inside verl"),
        ({"advantage": {"lam": 0.5}}, "differ from algorithm.gamma, lam = 0.9, 0.8"),
        ({"advantage": {"law": {"functional": "rank"}}}, "dvpo.advantage.law.functional = rank cannot be followed"),
        ({"critic": {"replay": 1}}, "dvpo.critic.replay = 1 cannot be followed"),
        ({"critic": {"lora": {"rank": 0}}}, "dvpo.critic.lora = .* cannot be followed"),
        ({"critic": {"trunk": "shared"}}, "dvpo.critic.trunk = shared cannot be followed"),
        ({"critic": {"num_quantile": 8}}, "did you mean critic.num_quantiles"),
    ],
)
def test_what_verl_cannot_follow_is_refused_in_one_sentence(settings: dict[str, Any], reason: str):
    with pytest.raises(InputError, match=reason):
        objective(**settings)


def test_every_setting_of_both_sections_is_followed_or_refused():
    """A setting that is new belongs into one of these lists, or, if it is not followed, among those refused."""
    followed = {"num_heads", "num_quantiles", "levels", "monotone", "kappa", "eta", "alpha", "beta", "weights"}
    followed |= {"tail_targets", "start", "verdict_tokens", "path"}
    followed |= {"gamma", "lam", "critic_lam", "target", "target_atoms", "law"}
    of_other_rows = {"histogram", "value_clip", "cql_weight"}
    source = inspect.getsource(make_objective)
    for section in (CriticConfig, AdvantageConfig):
        for field in dataclasses.fields(section):
            prefix = "critic" if section is CriticConfig else "advantage"
            assert field.name in followed | of_other_rows or f'"{prefix}.{field.name}"' in source, field.name


# The prepared critic.


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    settings = {**packaged_settings(), "critic": {"num_heads": 2, "num_quantiles": 4}}
    monkeypatch.setattr(prepare_module, "packaged_settings", lambda: settings)
    return settings


def test_a_prepared_critic_has_the_models_trunk_its_tokenizer_and_heads_that_are_the_same_every_time(
    tmp_path: Path, small: dict[str, Any]
):
    folders = [tmp_path / "one", tmp_path / "other"]
    for folder in folders:
        torch.rand(7)
        assert main([model_folder(), str(folder), "+dvpo.critic.monotone=false"]) == 0
    one, other = (load_critic(folder) for folder in folders)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert (one.shape.kind, one.shape.num_heads, one.shape.num_quantiles) == ("quantile", 2, 4)
    assert not one.shape.monotone
    assert AutoConfig.from_pretrained(folders[0]).architectures == ["Qwen3Model"]
    assert len(AutoTokenizer.from_pretrained(folders[0])) == len(AutoTokenizer.from_pretrained(model_folder()))


def test_the_trunk_may_be_a_reward_models(tmp_path: Path, small: dict[str, Any]):
    make_reward_model(model_folder(), torch.device("cpu")).save(tmp_path / "rm", {})
    judge = open_reward_model(tmp_path / "rm", torch.device("cpu")).model
    with torch.no_grad():
        judge.base_model.norm.weight.mul_(1.5)
    judge.save_pretrained(tmp_path / "rm")
    assert main([model_folder(), str(tmp_path / "critic"), f"+dvpo.critic.path={tmp_path / 'rm'}"]) == 0
    trunk = load_critic(tmp_path / "critic").trunk
    torch.testing.assert_close(trunk.norm.weight, judge.base_model.norm.weight)
    assert AutoConfig.from_pretrained(tmp_path / "critic").architectures == ["Qwen3Model"]


def test_a_trained_critic_keeps_its_heads(tmp_path: Path, small: dict[str, Any]):
    prepare(model_folder(), tmp_path / "fresh", small)
    trained = load_critic(tmp_path / "fresh")
    torch.nn.init.normal_(trained.heads.linear.weight)
    trained.save(tmp_path / "trained")
    assert main([str(tmp_path / "trained"), str(tmp_path / "again"), "--tokenizer", model_folder()]) == 0
    again = load_critic(tmp_path / "again")
    assert torch.equal(again.heads.linear.weight, trained.heads.linear.weight)


def test_bad_input_ends_in_one_sentence(tmp_path: Path, small: dict[str, Any], capsys: pytest.CaptureFixture[str]):
    prepare(model_folder(), tmp_path / "made", small)
    made, free = str(tmp_path / "made"), str(tmp_path / "free")
    for arguments, reason in {
        (model_folder(), made): "is not empty: name a new one",
        (str(tmp_path / "nowhere"), free): "is no folder",
        (made, free): "name its model with --tokenizer",
        (made, free, "dvpo.critic.num_quantiles=8", "--tokenizer", model_folder()): "was prepared with 4",
        (model_folder(), free, "dvpo.critic.num_quantile=8"): "did you mean critic.num_quantiles",
        (model_folder(), free, "critic.num_quantiles=8"): "critic is no setting of a prepared critic",
    }.items():
        assert main(list(arguments)) == 2
        assert reason in capsys.readouterr().err
    assert not Path(free).exists()


def test_the_check_says_that_verl_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(check, "find_spec", lambda name: None)
    assert check.main([]) == 1
    assert "verl is not installed: pip install 'dvpo[verl]'" in capsys.readouterr().err


@pytest.mark.parametrize(("found", "said"), [("0.9.7", False), ("0.10.0", True)])
def test_the_check_says_that_nobody_tried_another_verl(
    found: str, said: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(check, "find_spec", lambda name: "there")
    monkeypatch.setattr(check, "faults", lambda: iter(()))
    monkeypatch.setattr(check, "version", lambda name: found)
    assert check.main([]) == 0
    printed = capsys.readouterr()
    assert f"is loaded in verl {found}" in printed.out
    assert ("made for verl 0.9, and nobody tried another" in printed.err) == said
