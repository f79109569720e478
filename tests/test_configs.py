"""Every file under configs/ is a config that loads, and says how it is used."""

from pathlib import Path

import pytest

from dvpo.config import differences
from dvpo.loading import load_config

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_it_loads_explains_itself_and_has_an_output_folder_of_its_own(path: Path):
    assert path.read_text().startswith("# ")
    assert load_config(path).output == f"runs/{path.stem}"


def config(name: str):
    return load_config(next(path for path in CONFIGS if path.stem == name))


@pytest.mark.parametrize("kind", ["demo", "qwen3_8b"])
def test_dvpo_and_ppo_are_compared_with_everything_equal_but_the_critic_and_its_law(kind: str):
    keys = differences(config(f"{kind}_dvpo"), config(f"{kind}_ppo"))
    assert {key.split(".")[0] for key in keys if key != "advantage.law.functional"} == {"algorithm", "critic", "output"}


@pytest.mark.parametrize("name", ["qwen3_8b_dvpo", "qwen3_8b_dvpo_lora", "qwen3_8b_ppo"])
def test_the_reward_reaches_the_first_token_of_a_response_of_a_real_model(name: str):
    real = config(name)
    assert real.advantage.lam**real.sampling.max_completion_length > 0.5  # .95^4096 is 6e-92
    assert real.advantage.critic_lam is None


def test_the_real_model_has_the_methods_defaults_for_real_models():
    real = config("qwen3_8b_dvpo")
    assert (real.sampling.prompts_per_step, real.sampling.samples_per_prompt) == (64, 8)
    assert (real.critic.num_heads, real.critic.num_quantiles, real.critic.alpha) == (3, 200, 0.1)
    assert (real.policy_optimiser.lr, real.critic_optimiser.lr) == (1e-6, 1e-5)
    assert (real.model.dtype, real.update.minibatches, real.actor.kl.coef) == ("bfloat16", 2, 0)
