"""Answers of the starting model to the training prompts: what pseudo-labels and preference pairs are made of."""

from collections.abc import Sequence

import torch
from transformers import set_seed

from dvpo.config import Config
from dvpo.encoding import ChatEncoder, fit_prompts, within_context
from dvpo.errors import InputError
from dvpo.policy import choose_device, open_policy
from dvpo.sampling import Episode, HuggingFaceSampler, play_draws
from dvpo.scoring import Scorer
from dvpo.seeding import derive_seed
from dvpo.tasks import Example, Task, total
from dvpo.warmstart import starting_model


class Answerer:
    """The starting model of a config at the training prompts of its task.

    Args:
        config: names task, model, lengths, temperature and seed.
        task: instead of the one that the config names, made already.
        purpose: part of the seed, so that these draws are none of the training run's.

    Raises:
        InputError: an empty training split, or whatever is wrong with model or prompts.
    """

    def __init__(self, config: Config, task: Task, purpose: str) -> None:
        train = task.split("train")
        if not train:
            raise InputError(f"task.name = {config.task.name}: its training split is empty, give it an example")
        set_seed(config.seed)  # `model.weights: random` draws from the global generator, as training does
        device = torch.device(choose_device(config.device))
        model = config.model
        policy = open_policy(
            starting_model(config), device, model.dtype, weights=model.weights, template=model.template, learns=False
        )
        self.task, self.settings = task, within_context(config.sampling, policy.context_length)
        self.encoder = ChatEncoder(policy.tokenizer, policy.template)
        self.prompt_tokens = fit_prompts(train, self.encoder, config.sampling, policy.context_length)
        self.examples = [example for example in train if example.id in self.prompt_tokens]
        self._sampler = HuggingFaceSampler(policy, config.sampling)
        self._seed = derive_seed(config.seed, purpose)
        self._scorer = Scorer(task, reward=None)

    def answer(self, examples: Sequence[Example], samples: int, visit: int = 0) -> list[list[Episode]]:
        """`samples` finished episodes an example; keyed by (seed, example, visit, sample), whoever is beside it."""
        draws = [(example, visit) for example in examples]
        episodes, _ = play_draws(
            self.task, draws, samples, self.prompt_tokens, self.encoder, self._sampler, self.settings, self._seed
        )
        return [episodes[i : i + samples] for i in range(0, len(episodes), samples)]

    def true_returns(self, episodes: Sequence[Episode]) -> list[float]:
        """What the task says each episode is worth; NaN where it does not know."""
        return [total(reward) for reward in self._scorer.judge(episodes).rewards]
