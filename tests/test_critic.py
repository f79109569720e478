"""The critic: what its heads can say, which states they see, where its gradients go, and how it is kept."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dvpo.batch import Rollout
from dvpo.core.quantiles import quantile_levels
from dvpo.critic import Critic, load_critic, make_critic, open_critic
from dvpo.embedded import make_tokenizer
from dvpo.errors import InputError
from dvpo.heads import QuantileHeads, Verdict
from dvpo.policy import Policy
from dvpo.recomputing import recompute, recomputes
from dvpo.sampling import Episode, collate
from dvpo.settings_learning import CriticConfig
from dvpo.tasks import Example
from runs import run_config
from tiny_models import one_row, tiny_policy, with_begin_token

TOKENS = [70, 81, 92, 17, 40, 33, 44, 1, 200]


def new_critic(policy: Policy, kind: str = "quantile", seed: int = 0, **settings: object) -> Critic:
    torch.manual_seed(seed)
    return make_critic(kind, CriticConfig(**{"num_heads": 3, "num_quantiles": 5, **settings}), policy)


def predict(critic: Critic, policy: Policy, tokens: list[int]) -> Tensor:
    """Predictions at every column: [S, N, M]."""
    return critic.heads(critic.hidden_states(*one_row(tokens), policy))[0]


def wild_heads(heads: int, quantiles: int, monotone: bool) -> QuantileHeads:
    module = QuantileHeads(16, heads, quantiles, monotone)
    torch.nn.init.normal_(module.linear.weight, std=5.0)
    torch.nn.init.normal_(module.linear.bias, std=5.0)
    return module


# Heads


def test_monotone_heads_never_cross_and_plain_ones_can():
    torch.manual_seed(0)
    states_KD = 3 * torch.randn(500, 16)
    assert (wild_heads(3, 20, monotone=True)(states_KD).diff(dim=-1) >= 0).all()
    assert (wild_heads(3, 20, monotone=False)(states_KD).diff(dim=-1) < 0).any()


def test_the_mean_of_a_monotone_head_is_its_base():
    torch.manual_seed(0)
    heads, states_KD = wild_heads(2, 7, monotone=True), torch.randn(50, 16)
    base_KN = heads.linear(states_KD).unflatten(-1, (2, 8))[..., 0]
    torch.testing.assert_close(heads(states_KD).mean(-1), base_KN, rtol=1e-5, atol=1e-4)


def test_a_quantile_of_a_monotone_head_by_hand():
    # base 2, x = (0, ln(e - 1), -100): softplus = (ln 2, 1, 0), c = (.6931, 1.6931, 1.6931),
    # c / 3 = (.2310, .5644, .5644) with mean .4533: theta = 2 + (-.2222, .1111, .1111).
    heads = QuantileHeads(1, 1, 3, monotone=True)
    with torch.no_grad():
        heads.linear.weight.zero_()
        heads.linear.bias.copy_(torch.tensor([2.0, 0.0, 0.541324855, -100.0]))
    torch.testing.assert_close(heads(torch.ones(1))[0], torch.tensor([1.77777, 2.11111, 2.11111]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("monotone", [True, False])
def test_one_quantile_is_a_scalar_head(monotone):
    torch.manual_seed(0)
    heads, states_KD = QuantileHeads(16, 3, 1, monotone), torch.randn(5, 16)
    assert heads.linear.out_features == 3
    assert torch.equal(heads(states_KD).squeeze(-1), heads.linear(states_KD))


def test_heads_begin_near_zero_differ_from_each_other_and_monotone_ones_spread_over_one_unit_of_reward():
    torch.manual_seed(0)
    states_KD = torch.randn(200, 64)
    for monotone, spread in ((True, 0.95), (False, 0.0)):  # 20 quantiles: 19 steps of 1/20
        theta_KNM = QuantileHeads(64, 3, 20, monotone)(states_KD)
        assert theta_KNM.mean(-1).abs().max() < 0.1
        torch.testing.assert_close(
            (theta_KNM[..., -1] - theta_KNM[..., 0]).mean(), torch.tensor(spread), rtol=0, atol=0.02
        )
        assert (theta_KNM[:, 0] - theta_KNM[:, 1]).abs().max() > 1e-3


def test_heads_compute_in_float32_whatever_type_the_trunk_has():
    torch.manual_seed(0)
    heads, states_KD = QuantileHeads(16, 2, 4, monotone=True), torch.randn(3, 16).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theta_KNM = heads(states_KD)
    assert theta_KNM.dtype is heads.linear.weight.dtype is torch.float32
    assert torch.equal(theta_KNM, heads(states_KD.float()))


# States


@pytest.mark.parametrize("trunk", ["own", "frozen", "shared"])
@torch.no_grad()
def test_the_value_of_a_state_knows_the_tokens_before_it_and_not_its_own_token(trunk):
    """V(s_t) stands in the column before token t: token t must change V(s_{t+1}) and no earlier value."""
    policy = tiny_policy()
    critic = new_critic(policy, trunk=trunk)
    column = 5  # of token t; its state is read from column 4
    changed = [*TOKENS]
    changed[column] += 1
    before_SNM, after_SNM = predict(critic, policy, TOKENS), predict(critic, policy, changed)
    assert torch.equal(before_SNM[:column], after_SNM[:column])
    assert (before_SNM[column] != after_SNM[column]).all()  # reading one column too late would know the token
    assert (before_SNM[column + 1] != after_SNM[column + 1]).any()


@torch.no_grad()
def test_a_fresh_critic_reads_what_the_policys_own_trunk_says():
    policy = tiny_policy("gpt2")
    states = [new_critic(policy, trunk=t).hidden_states(*one_row(TOKENS), policy) for t in ("own", "frozen", "shared")]
    assert all(torch.equal(states[0], other) for other in states[1:])
    assert torch.equal(states[0], policy.hidden_states(*one_row(TOKENS)))


@torch.no_grad()
def test_its_trunk_computes_in_the_policys_type_and_so_does_one_that_is_opened(tmp_path):
    policy = replace(tiny_policy(), dtype=torch.bfloat16)
    critic = new_critic(policy)
    critic.save(tmp_path)
    row = one_row(TOKENS)
    expected_BSD = policy.hidden_states(*row)
    assert not torch.equal(expected_BSD, tiny_policy().hidden_states(*row))  # of float32
    for one in (critic, load_critic(tmp_path, dtype=torch.bfloat16)):
        assert torch.equal(one.hidden_states(*row, policy), expected_BSD)


# Gradients


@pytest.mark.parametrize(("trunk", "trunk_learns"), [("own", True), ("frozen", False), ("shared", False)])
def test_critic_gradients_reach_heads_and_an_own_trunk_and_never_the_policy(trunk, trunk_learns):
    policy = tiny_policy()
    critic = new_critic(policy, trunk=trunk)
    predict(critic, policy, TOKENS).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in critic.heads.parameters())
    assert all(p.grad is None for p in policy.model.parameters())
    in_trunk = [] if critic.trunk is None else list(critic.trunk.parameters())
    assert (critic.trunk is None) == (trunk == "shared")
    assert all((p.grad is not None) == p.requires_grad == trunk_learns for p in in_trunk)


def test_training_the_critics_trunk_leaves_the_policys_where_it_was():
    policy = tiny_policy()
    critic = new_critic(policy)
    before_SD = policy.hidden_states(*one_row(TOKENS)).detach()
    predict(critic, policy, TOKENS).sum().backward()
    torch.optim.SGD(critic.parameters(), lr=1.0).step()
    assert torch.equal(policy.hidden_states(*one_row(TOKENS)), before_SD)
    assert not torch.equal(critic.hidden_states(*one_row(TOKENS), policy), before_SD)


def test_a_shared_trunk_follows_the_policy():
    policy = tiny_policy()
    shared, own = new_critic(policy, trunk="shared"), new_critic(policy)
    before = [predict(critic, policy, TOKENS) for critic in (shared, own)]
    with torch.no_grad():
        policy.model.get_input_embeddings().weight.mul_(2)
    assert not torch.equal(predict(shared, policy, TOKENS), before[0])
    assert torch.equal(predict(own, policy, TOKENS), before[1])


def with_checkpointing(policy: Policy) -> Policy:
    recompute(policy.model)
    policy.model.train()  # transformers recomputes in training mode only
    return policy


def trunk_recomputes(critic: Critic | None) -> bool:
    return recomputes(critic.trunk) and critic.trunk.training


def test_activations_are_recomputed_where_the_policys_are_in_a_new_critic_and_in_a_resumed_one(tmp_path):
    plain = run_config(tmp_path / "run")
    config = run_config(tmp_path / "run", "model.gradient_checkpointing=true")
    make_critic("quantile", config.critic, tiny_policy()).save(tmp_path / "critic")
    for checkpoint in (None, tmp_path):
        assert not trunk_recomputes(open_critic("quantile", plain, tiny_policy(), checkpoint))
        assert trunk_recomputes(open_critic("quantile", config, with_checkpointing(tiny_policy()), checkpoint))


# Kept and opened


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gemma2"])
@pytest.mark.parametrize("trunk", ["own", "frozen", "shared"])
@torch.no_grad()
def test_a_saved_critic_is_opened_bit_by_bit_and_from_safetensors_alone(family, trunk, tmp_path):
    policy = tiny_policy(family)
    critic = new_critic(policy, trunk=trunk)
    critic.save(tmp_path)
    files = {file.name for file in tmp_path.iterdir()}
    assert files == {"critic.safetensors", "critic.json"} | ({"config.json"} if trunk != "shared" else set())
    torch.manual_seed(99)
    again = load_critic(tmp_path)
    assert again.shape == critic.shape
    assert torch.equal(predict(again, policy, TOKENS), predict(critic, policy, TOKENS))
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in critic.parameters()]


def test_a_scalar_critic_has_one_quantile_a_head_whatever_the_config_says(tmp_path):
    policy = tiny_policy()
    critic = new_critic(policy, kind="scalar", num_quantiles=32)
    assert predict(critic, policy, TOKENS).shape == (len(TOKENS), 3, 1)
    critic.save(tmp_path)
    assert load_critic(tmp_path).shape.kind == "scalar"


def test_an_implicit_critic_is_read_at_the_levels_of_the_config():
    for levels in ("midpoint", "paper"):
        critic = new_critic(tiny_policy(), kind="implicit", levels=levels)
        assert torch.equal(critic.heads.levels_M, quantile_levels(5, levels).float())


def test_heads_are_drawn_from_the_global_generator_and_the_trunk_is_not():
    policy = tiny_policy()
    one, same, other = (new_critic(policy, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.heads.linear.weight, same.heads.linear.weight)
    assert not torch.equal(one.heads.linear.weight, other.heads.linear.weight)
    assert all(torch.equal(a, b) for a, b in zip(one.trunk.parameters(), other.trunk.parameters(), strict=True))


@pytest.mark.parametrize("damage", ["no folder", "no trunk config", "cut file", "other width", "unknown field"])
def test_a_folder_that_holds_no_sound_critic_is_an_input_error_in_one_line(damage, tmp_path):
    folder = tmp_path / "critic"
    new_critic(tiny_policy()).save(folder)
    if damage == "no folder":
        folder = tmp_path / "nowhere"
    elif damage == "no trunk config":
        (folder / "config.json").unlink()
    elif damage == "cut file":
        file = folder / "critic.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "other width":
        file = folder / "critic.json"
        file.write_text(file.read_text().replace('"num_quantiles": 5', '"num_quantiles": 6'))
    else:
        file = folder / "critic.json"
        file.write_text(file.read_text().replace('"levels"', '"bevels"'))
    with pytest.raises(InputError, match="critic folder") as caught:
        load_critic(folder)
    assert "\n" not in str(caught.value)


# Verdict


@pytest.mark.parametrize("kind", ["scalar", "quantile"])
@pytest.mark.parametrize("family", ["qwen3", "gpt2", "cohere", "granite"])
@torch.no_grad()
def test_a_verdict_start_adds_the_sigmoid_of_the_models_own_logit_difference_to_every_quantile(family, kind):
    policy = tiny_policy(family)
    critic = new_critic(policy, kind=kind, start="verdict")
    hidden_SD = critic.hidden_states(*one_row(TOKENS), policy)[0]
    good, bad = policy.tokenizer.convert_tokens_to_ids(["<|good|>", "<|bad|>"])
    logits_SV = policy.model(one_row(TOKENS)[0]).logits[0]
    verdict_S = torch.sigmoid(logits_SV[:, good] - logits_SV[:, bad])
    assert verdict_S.std() > 0.01
    expected_SNM = critic.heads(hidden_SD) + verdict_S[:, None, None]
    torch.testing.assert_close(critic(hidden_SD), expected_SNM, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "cohere", "granite"])  # the two last scale their logits
@torch.no_grad()
def test_a_bias_of_the_language_model_head_is_part_of_the_verdict_and_is_kept(family, tmp_path):
    policy = tiny_policy(family)
    good, bad = policy.tokenizer.convert_tokens_to_ids(["<|good|>", "<|bad|>"])
    bias_V = torch.zeros(264)
    bias_V[good], bias_V[bad] = 1.5, -0.5
    policy.model.get_output_embeddings().bias = torch.nn.Parameter(bias_V)
    critic = new_critic(policy, start="verdict")
    hidden_SD = critic.hidden_states(*one_row(TOKENS), policy)[0]
    logits_SV = policy.model(one_row(TOKENS)[0]).logits[0]
    expected_S = torch.sigmoid(logits_SV[:, good] - logits_SV[:, bad])
    critic.save(tmp_path)
    for one in (critic, load_critic(tmp_path)):
        torch.testing.assert_close(one.verdict(hidden_SD)[:, 0, 0], expected_S, rtol=0, atol=1e-5)


def test_the_verdicts_tokens_are_read_without_the_begin_token_that_a_tokenizer_puts_before_a_text():
    plain = tiny_policy()
    begun = replace(plain, tokenizer=with_begin_token(make_tokenizer()))
    assert len(begun.tokenizer("<|good|>")["input_ids"]) == 2
    directions = [new_critic(policy, start="verdict").verdict.direction for policy in (plain, begun)]
    assert torch.equal(*directions)


@torch.no_grad()
def test_an_implicit_critic_trains_at_the_levels_drawn_around_the_verdict():
    policy = tiny_policy()
    critic = new_critic(policy, kind="implicit", start="verdict")
    critic.draw_levels(1)
    states_KD = critic.hidden_states(*one_row(TOKENS), policy)[0]
    predictions_KNM = critic.predictions(states_KD, torch.tensor(TOKENS))
    theta_KNM = critic.heads(states_KD, critic.heads.drawn_M) + critic.verdict(states_KD)
    assert torch.equal(predictions_KNM[:, :-1], theta_KNM)
    assert torch.equal(predictions_KNM[:, -1], critic.heads.drawn_M.expand(len(TOKENS), -1))


def test_a_frozen_trunk_stays_frozen_once_the_verdict_has_learnt_alone():
    critic = new_critic(tiny_policy(), trunk="frozen", start="verdict")
    for alone in (True, False):
        critic.learn_verdict_alone(alone)
        learning = {name for name, parameter in critic.named_parameters() if parameter.requires_grad}
        rest = {"heads.linear.weight", "heads.linear.bias", "verdict.direction"}
        assert learning == ({"verdict.moved"} if alone else rest)


def test_scale_and_bias_find_how_noise_distorts_a_verdict_within_a_hundred_steps_of_adam():
    """False positives .4 and false negatives .4 turn a success probability v into .4 + .2 v."""
    torch.manual_seed(0)
    verdict, states_KD = Verdict(4, 1), torch.randn(500, 4)
    with torch.no_grad():
        verdict.direction.copy_(torch.tensor([2.0, -1.0, 0.5, 0.0]))
        target_K = 0.4 + 0.2 * torch.sigmoid(states_KD @ verdict.direction)
    adam = torch.optim.AdamW([verdict.moved], lr=1e-3)
    for _ in range(100):
        adam.zero_grad()
        (verdict(states_KD).flatten() - target_K).square().mean().backward()
        adam.step()
    torch.testing.assert_close(verdict(states_KD).flatten(), target_K, rtol=0, atol=0.02)
    torch.testing.assert_close(1 + verdict.REACH * verdict.moved[0], torch.tensor([0.2]), rtol=0, atol=0.05)


# What it reads of a rollout


def make_rollout(hints: list[list[int]] | None = None) -> Rollout:
    """Two rows, prompts of 2 and 4 tokens, responses of 5 and 3."""
    rows = [([70, 81], [92, 17, 40, 33, 1]), ([44, 45, 46, 47], [200, 99, 1])]
    episodes = [
        Episode(Example(f"p{i}", "x"), 0, 0, prompt, tokens, [0] * len(tokens), [-0.5 - j for j in range(len(tokens))])
        for i, (prompt, tokens) in enumerate(rows)
    ]
    scores = {"rewards_BT": torch.zeros(2, 5)} | {f: torch.zeros(2) for f in ("rewarded_B", "observed_B", "true_B")}
    rollout = collate(episodes, scores, 0, policy_version=0)
    return rollout if hints is None else replace(rollout, hints_BH=torch.tensor(hints))


@pytest.mark.parametrize("kind", ["scalar", "quantile"])
@pytest.mark.parametrize("trunk", ["own", "frozen", "shared"])
@pytest.mark.parametrize("field", ["sampler_logprobs_BT", "entropies_BT"])
@torch.no_grad()
def test_a_feature_of_token_t_is_known_in_the_state_behind_it_and_in_no_state_before(field, trunk, kind):
    policy, rollout, t = tiny_policy(), make_rollout(), 2
    critic = new_critic(policy, kind=kind, trunk=trunk, features=True)
    value_BT = getattr(rollout, field).clone()
    value_BT[0, t] -= 3.0
    other = replace(rollout, **{field: value_BT})
    before_BUNM, after_BUNM = (critic(critic.states(r, policy)) for r in (rollout, other))
    changed_U = (before_BUNM != after_BUNM)[0].flatten(1).any(dim=1)
    assert changed_U.nonzero().flatten().tolist() == [t + 1]  # t itself would leak the token that is to be valued
    assert torch.equal(before_BUNM[1], after_BUNM[1])


@torch.no_grad()
def test_the_state_before_the_first_token_has_features_of_0_and_the_end_has_the_last_tokens():
    policy, rollout = tiny_policy(), make_rollout()
    features_BU2 = new_critic(policy, features=True).states(rollout, policy)[..., -2:]
    assert features_BU2[0, :, 0].tolist() == [0.0, -0.5, -1.5, -2.5, -3.5, -4.5]
    assert (features_BU2[..., 1] == 0).all()


@torch.no_grad()
def test_a_hint_is_read_as_if_it_stood_right_before_the_prompt_whatever_the_padding_between():
    policy, rollout = tiny_policy(), make_rollout([[-1, 60], [61, 62]])
    critic = new_critic(policy)
    states_BUD = critic.states(rollout, policy)
    for row, (hint, prompt, tokens) in enumerate(
        [([60], [70, 81], [92, 17, 40, 33, 1]), ([61, 62], [44, 45, 46, 47], [200, 99, 1])]
    ):
        whole_SD = critic.hidden_states(*one_row([*hint, *prompt, *tokens]), policy)[0]
        torch.testing.assert_close(states_BUD[row, : len(tokens) + 1], whole_SD[-len(tokens) - 1 :])


@torch.no_grad()
def test_without_levers_the_states_are_the_hidden_states_of_the_columns_before_and_of_the_last():
    policy, rollout = tiny_policy(), make_rollout()
    critic = new_critic(policy)
    hidden_BSD = critic.hidden_states(rollout.tokens_BS, rollout.attention_BS, policy)
    assert torch.equal(critic.states(rollout, policy), hidden_BSD[:, rollout.prompt_length - 1 :])


@torch.no_grad()
def test_a_critic_with_verdict_and_features_is_opened_bit_by_bit(tmp_path):
    policy, rollout = tiny_policy(), make_rollout()
    critic = new_critic(policy, start="verdict", features=True)
    critic.verdict.moved.normal_()
    critic.save(tmp_path)
    again = load_critic(tmp_path)
    assert again.shape == critic.shape
    assert torch.equal(again(again.states(rollout, policy)), critic(critic.states(rollout, policy)))
