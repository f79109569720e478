"""A Q critic over the vocabulary: what its states are worth, what its loss reads, and that nothing huge is made."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dvpo import policy as policy_module
from dvpo.algorithms import ALGORITHMS
from dvpo.batch import Rollout
from dvpo.critic import Critic, load_critic, make_critic
from dvpo.errors import InputError
from dvpo.heads import VocabularyHead
from dvpo.loading import load_config
from dvpo.settings_learning import CriticConfig
from dvpo.trainer import Trainer
from largest_tensor import LargestTensor
from runs import Parity, run_config
from tiny_models import one_row, tiny_policy

ROW = ALGORITHMS["cql_ppo"]


def wild_critic(seed: int = 0, trunk: str = "own") -> Critic:
    torch.manual_seed(seed)
    critic = make_critic("vocabulary", CriticConfig(trunk=trunk), tiny_policy())  # type: ignore[arg-type]
    nn.init.normal_(critic.heads.linear.weight, std=0.5)
    return critic


@pytest.fixture
def played(tmp_path: Path) -> tuple[Trainer, Rollout]:
    """A trainer of the row at temperature 1.2, with the responses of a step, some of them cut short."""
    trainer = Trainer(
        run_config(tmp_path / "run", "algorithm=cql_ppo", "sampling.max_completion_length=6"), task=Parity()
    )
    nn.init.normal_(trainer.critic.heads.linear.weight, std=0.5)
    trainer.close()
    return trainer, trainer.collect()[0]


# What a state is worth


@pytest.mark.parametrize("logits_at_once", [1 << 24, 7 * 264])
@torch.no_grad()
def test_a_state_is_worth_what_the_policys_next_token_is_expected_to_be(
    logits_at_once: int, played: tuple[Trainer, Rollout], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy_module, "LOGIT_BUDGET", logits_at_once)
    trainer, rollout = played
    values_BT11, bootstrap_B11 = trainer._values(rollout)
    out = trainer.policy.model(input_ids=rollout.tokens_BS, attention_mask=rollout.attention_BS.long(),
                               position_ids=(rollout.attention_BS.long().cumsum(-1) - 1).clamp(min=0))  # fmt: skip
    hidden_BSD = trainer.critic.hidden_states(rollout.tokens_BS, rollout.attention_BS, trainer.policy)
    naive_BS = ((out.logits / 1.2).softmax(-1) * trainer.critic.heads.linear(hidden_BSD)).sum(-1)
    naive_BU = naive_BS[:, rollout.prompt_length - 1 :]
    mask_BT = rollout.mask_BT
    torch.testing.assert_close(values_BT11[mask_BT].flatten(), naive_BU[:, :-1][mask_BT], rtol=1e-4, atol=1e-5)
    ends_B = rollout.attention_BS[:, rollout.prompt_length :].sum(-1, keepdim=True)
    torch.testing.assert_close(bootstrap_B11.flatten(), naive_BU.gather(1, ends_B).flatten(), rtol=1e-4, atol=1e-5)


def test_a_policy_that_has_decided_gets_the_q_of_its_token_and_no_gradient() -> None:
    policy, critic = tiny_policy(), wild_critic()
    policy_KD, hidden_KD = torch.randn(5, 16, requires_grad=True), torch.randn(5, 16, requires_grad=True)
    values_K = critic.heads.expected(hidden_KD, policy_KD, policy, temperature=1e-4)
    choice_K = policy.logits(policy_KD).argmax(-1)
    torch.testing.assert_close(values_K, critic.heads(hidden_KD).gather(-1, choice_K[:, None])[:, 0].detach())
    assert not values_K.requires_grad


def test_a_fresh_head_holds_every_token_worth_about_0() -> None:
    torch.manual_seed(0)
    assert VocabularyHead(16, 264)(torch.randn(5, 16)).abs().max() < 0.1


# What the loss reads


def losses(taken: float, soft_maximum: float, target: float, weight: float) -> dict[str, Tensor]:
    config = load_config({"algorithm": "cql_ppo"}, [f"critic.cql_weight={weight}"])
    pair_KNM = torch.tensor([[[taken, soft_maximum]]])
    return ROW.critic_loss(pair_KNM, torch.zeros(1, 1, 1), torch.tensor([[target]]), config)


def test_the_loss_by_hand() -> None:
    # (.7 - .2)^2 / 2 = .125; 2 - .7 = 1.3; .125 + .1 * 1.3 = .255
    terms = losses(taken=0.7, soft_maximum=2.0, target=0.2, weight=0.1)
    torch.testing.assert_close(terms["loss"], torch.tensor([0.255]))
    torch.testing.assert_close(terms["conservative"], torch.tensor([1.3]))


def test_without_its_weight_it_is_ppos_squared_error_of_the_token_taken() -> None:
    config = load_config({"algorithm": "ppo"}, ["critic.value_clip=null"])
    taken = torch.tensor([[[0.7]]])
    ppo = ALGORITHMS["ppo"].critic_loss(taken, taken, torch.tensor([[0.2]]), config)
    torch.testing.assert_close(losses(0.7, 2.0, 0.2, weight=0)["loss"], ppo["loss"])


@pytest.mark.parametrize("logits_at_once", [1 << 24, 3 * 264, 1])
def test_value_and_gradient_of_the_loss_are_those_of_the_full_table(
    logits_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy_module, "LOGIT_BUDGET", logits_at_once)
    policy, critic, config = tiny_policy(), wild_critic(), load_config({"algorithm": "cql_ppo"})
    tokens = [70, 81, 92, 17, 40, 33, 44, 1]
    tokens_K, targets_K1 = torch.tensor(tokens[1:]), torch.linspace(-1, 1, 7).unsqueeze(-1)

    def states() -> Tensor:
        return critic.hidden_states(*one_row(tokens), policy)[0, :-1]

    def gradients(loss: Tensor) -> list[Tensor]:
        critic.zero_grad()
        loss.backward()
        return [p.grad.clone() for p in critic.parameters() if p.grad is not None]

    predictions_KNM = critic.predictions(states(), tokens_K)
    ours = ROW.critic_loss(predictions_KNM, predictions_KNM, targets_K1, config)["loss"].sum()
    table_KV = critic.heads.linear(states())
    taken_K = table_KV[torch.arange(7), tokens_K]
    naive = ((taken_K - targets_K1[:, 0]) ** 2 / 2 + 0.1 * (table_KV.exp().sum(-1).log() - taken_K)).sum()
    torch.testing.assert_close(ours, naive)
    for one, other in zip(gradients(ours), gradients(naive), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    assert all(p.grad is None for p in policy.model.parameters())


def test_the_conservative_term_pushes_every_token_down_but_the_one_taken() -> None:
    # d (logsumexp Q - Q_a) / dQ = softmax(Q) - onehot(a); at Q = 0 and V = 4: 1/4 each, and 1/4 - 1 for the taken.
    head = VocabularyHead(1, 4)
    nn.init.zeros_(head.linear.weight)
    taken_K, soft_maximum_K = head.taken_and_soft_maximum(torch.ones(1, 1), torch.tensor([2])).unbind(-1)
    (soft_maximum_K - taken_K).sum().backward()
    torch.testing.assert_close(head.linear.bias.grad, torch.tensor([0.25, 0.25, -0.75, 0.25]))


def test_trained_on_one_token_it_finds_the_fixed_point_of_regression_and_pessimism() -> None:
    """Stationary where Q_a - G_a + w (softmax_a / pi_a - 1) = 0 for tokens taken with probability pi_a.

    pi = (1/2, 1/2, 0), G = (1, 0, -), w = .2: the token never taken falls, the other two stay near their returns.
    """
    head = VocabularyHead(1, 3)
    nn.init.zeros_(head.linear.weight)
    head.linear.weight.requires_grad_(False)
    config = load_config({"algorithm": "cql_ppo"}, ["critic.cql_weight=0.2"])
    optimiser = torch.optim.SGD(head.parameters(), lr=0.5)
    for _ in range(3000):
        optimiser.zero_grad()
        pair_KNM = head.taken_and_soft_maximum(torch.ones(2, 1), torch.tensor([0, 1])).unsqueeze(-2)
        ROW.critic_loss(pair_KNM, pair_KNM, torch.tensor([[1.0], [0.0]]), config)["loss"].mean().backward()
        optimiser.step()
    q_V = head.linear.bias.detach()
    expected = torch.tensor([1.0, 0.0]) - 0.2 * (q_V.softmax(-1)[:2] / 0.5 - 1)
    torch.testing.assert_close(q_V[:2], expected, rtol=0, atol=1e-3)
    assert q_V[2] < -3


def test_a_verdict_is_no_start_for_a_critic_of_tokens() -> None:
    with pytest.raises(InputError, match=r"critic\.start = verdict is a value of states"):
        load_config({"algorithm": "cql_ppo"}, ["critic.start=verdict"])


# Memory and disk


def test_no_tensor_of_all_tokens_by_the_vocabulary_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, critic, chunk, count = tiny_policy(), wild_critic(), 40, 400
    monkeypatch.setattr(policy_module, "LOGIT_BUDGET", chunk * 264)
    hidden_KD, tokens_K = torch.randn(count, 16, requires_grad=True), torch.randint(264, (count,))
    with LargestTensor() as ours:
        critic.predictions(hidden_KD, tokens_K).sum().backward()
        critic.heads.expected(hidden_KD, hidden_KD, policy, temperature=1.0)
    assert ours.entries == chunk * 264
    with LargestTensor() as naive:
        critic.heads(hidden_KD).sum().backward()
    assert naive.entries == count * 264


@pytest.mark.parametrize("trunk", ["own", "shared"])
@torch.no_grad()
def test_a_saved_vocabulary_critic_is_opened_bit_by_bit(trunk: str, tmp_path: Path) -> None:
    critic = wild_critic(trunk=trunk)
    critic.save(tmp_path)
    again = load_critic(tmp_path)
    assert again.shape == critic.shape
    assert torch.equal(again.heads(torch.ones(16)), critic.heads(torch.ones(16)))
