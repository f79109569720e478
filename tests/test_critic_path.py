"""`critic.path`: a critic whose trunk starts as a reward model's, or that goes on as an earlier run's."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dvpo.critic import load_critic
from dvpo.embedded import make_config, make_model, make_tokenizer
from dvpo.errors import InputError
from dvpo.reward_model import make_reward_model, open_reward_model
from dvpo.settings_learning import CriticConfig
from dvpo.trainer import Trainer
from runs import Parity, run_config, trained
from test_critic import TOKENS, new_critic, predict, trunk_recomputes, with_checkpointing
from tiny_models import merging_tokenizer, one_row, tiny_policy


@pytest.fixture(scope="module")
def reward_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model whose trunk is not the policy's, and not as wide."""
    folder = tmp_path_factory.mktemp("reward-model")
    make_model(make_config(hidden_size=64, num_hidden_layers=2, intermediate_size=32), seed=5).save_pretrained(
        folder / "start"
    )
    make_tokenizer().save_pretrained(folder / "start")
    make_reward_model(folder / "start", torch.device("cpu")).save(folder / "rm", {})
    return folder / "rm"


def test_a_critics_trunk_starts_as_the_reward_models_and_is_kept_and_trained(reward_model_folder: Path, tmp_path: Path):
    policy = tiny_policy()
    critic = new_critic(policy, path=str(reward_model_folder))
    model = open_reward_model(reward_model_folder, torch.device("cpu")).model
    tokens_BS, attention_BS = one_row(TOKENS)
    expected_BSD = model.base_model(input_ids=tokens_BS, attention_mask=attention_BS.long()).last_hidden_state
    torch.testing.assert_close(critic.hidden_states(tokens_BS, attention_BS, policy), expected_BSD)
    assert critic.shape.hidden_size == 64  # the policy's is 16
    critic.save(tmp_path)
    torch.testing.assert_close(predict(load_critic(tmp_path), policy, TOKENS), predict(critic, policy, TOKENS))
    run = trained(tmp_path / "run", f"critic.path={reward_model_folder}")
    assert run.critic is not None
    moved = [
        not torch.equal(a, b) for a, b in zip(run.critic.trunk.parameters(), critic.trunk.parameters(), strict=True)
    ]
    assert any(moved)


def test_a_folder_that_is_no_reward_model_of_the_policys_tokens_is_refused(reward_model_folder: Path, tmp_path: Path):
    with pytest.raises(InputError, match=r"critic\.path: .* holds a Qwen3ForCausalLM, no reward model"):
        new_critic(tiny_policy(), path=str(reward_model_folder.parent / "start"))
    other = replace(tiny_policy(vocabulary=266), tokenizer=merging_tokenizer())
    with pytest.raises(InputError, match="the reward model's tokenizer is not the policy's"):
        new_critic(other, path=str(reward_model_folder))
    with pytest.raises(ValueError, match=r"critic\.path = rm starts a trunk of the critic's own"):
        CriticConfig(path="rm", trunk="shared")
    with pytest.raises(InputError, match=r"critic\.path = .* is a reward model, and critic\.start = verdict"):
        new_critic(tiny_policy(), path=str(reward_model_folder), start="verdict")


@pytest.mark.parametrize("further", [{}, {"start": "verdict"}, {"kind": "categorical"}])
def test_an_earlier_runs_critic_goes_on_as_it_was_trunk_and_heads(further: dict[str, str], tmp_path: Path):
    policy = tiny_policy()
    earlier = new_critic(policy, **further)
    with torch.no_grad():
        for parameter in earlier.parameters():
            parameter.add_(0.5)
    earlier.save(tmp_path)
    critic = new_critic(policy, seed=1, path=str(tmp_path), **further)
    for name, tensor in earlier.state_dict().items():
        assert torch.equal(critic.state_dict()[name], tensor), name


def test_activations_are_recomputed_where_the_policys_are_whatever_the_trunk_starts_as(
    reward_model_folder: Path, tmp_path: Path
):
    new_critic(tiny_policy()).save(tmp_path)
    for path in (reward_model_folder, tmp_path):
        assert not trunk_recomputes(new_critic(tiny_policy(), path=str(path)))
        assert trunk_recomputes(new_critic(with_checkpointing(tiny_policy()), path=str(path)))


def test_an_earlier_critic_of_another_form_or_of_another_model_is_refused(tmp_path: Path):
    new_critic(tiny_policy()).save(tmp_path)
    with pytest.raises(InputError, match=r"critic.num_heads = 2: the critic of critic.path = .* has 3, "):
        new_critic(tiny_policy(), path=str(tmp_path), num_heads=2)
    with pytest.raises(InputError, match="the critic has 264 tokens, the policy 266: take a critic"):
        new_critic(tiny_policy(vocabulary=266), path=str(tmp_path))


def test_a_run_or_a_checkpoint_in_place_of_its_critic_is_refused_with_the_critics_path(tmp_path: Path):
    trained(tmp_path / "run").close()
    critic = tmp_path / "run" / "checkpoint-2" / "critic"
    for folder in (tmp_path / "run", critic.parent):
        with pytest.raises(
            InputError, match=re.escape(f"critic.path = {folder} is a run or a checkpoint of one: ")
        ) as e:
            new_critic(tiny_policy(), path=str(folder))
        assert str(e.value).endswith(f"name its critic, {critic}")


def test_a_run_trains_an_earlier_runs_critic_and_with_adapters_builds_on_it(tmp_path: Path):
    first = trained(tmp_path / "first")
    path = f"critic.path={tmp_path}/first/checkpoint-2/critic"
    second = Trainer(run_config(tmp_path / "second", path, "seed=1"), task=Parity())
    assert all(map(torch.equal, second.critic.parameters(), first.critic.parameters()))
    second.train()
    assert not any(map(torch.equal, second.critic.heads.parameters(), first.critic.heads.parameters()))
    adapted = Trainer(run_config(tmp_path / "adapted", path, "seed=1", "model.lora.rank=2"), task=Parity())
    assert all(map(torch.equal, adapted.critic.heads.parameters(), first.critic.heads.parameters()))
