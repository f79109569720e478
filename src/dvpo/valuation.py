"""A trained critic by itself: what it expects of texts, with nothing being trained.

    from dvpo import load_critic

    critic = load_critic("runs/mine")
    for reading in critic.read(prompts, responses):
        print(reading.value, reading.law_M)

A state is what the critic has read so far: the prompt, and the first t tokens of the response. A `Reading` has the
value law at all T + 1 of them. The last one has seen the whole response and predicts its return, as far as the critic
learnt to: that is the law to rank responses by. (No end token is added: in training, the state before the end token is
the last that is learnt.)
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dvpo.batch import Rollout
from dvpo.config import Config
from dvpo.core.risk import cvar, upper_mean
from dvpo.critic import Critic
from dvpo.encoding import ChatEncoder
from dvpo.errors import InputError
from dvpo.loading import load_config
from dvpo.policy import Policy
from dvpo.sampling import Episode, collate
from dvpo.tasks import Example, Prompt
from dvpo.token_view import token_texts
from dvpo.trained import open_trained, open_trained_critic, sound_checkpoint


@dataclass(frozen=True)
class Reading:
    """What the critic expected while it read one response of T tokens."""

    tokens: tuple[str, ...]
    """T texts, one a token; "" where a character needs the next token as well."""
    heads_UNM: Tensor
    """[T + 1, N, M]: each head's quantiles at every state; M = 1 for a scalar critic."""

    @property
    def laws_UM(self) -> Tensor:
        """The value law at every state: the mean over heads, sorted."""
        return self.heads_UNM.mean(dim=1).sort(dim=-1).values

    @property
    def law_M(self) -> Tensor:
        """The value law of the whole response."""
        return self.laws_UM[-1]

    @property
    def values_U(self) -> Tensor:
        """The mean of the law at every state: values_U[t] is before token t, values_U[t + 1] behind it."""
        return self.laws_UM.mean(dim=-1)

    @property
    def value(self) -> float:
        """The expected return of the whole response."""
        return float(self.values_U[-1])

    @property
    def changes_T(self) -> Tensor:
        """By how much each token moved the value; far below 0: the critic doubts that token."""
        return self.values_U.diff()

    def lower(self, alpha: float) -> float:
        """Mean of the lower `alpha` of the law's mass: what to rank by if a bad response costs more than a good one is
        worth."""
        return float(cvar(self.law_M, alpha))

    def upper(self, beta: float) -> float:
        """Mean of the upper `beta` of the law's mass."""
        return float(upper_mean(self.law_M, beta))


@dataclass(frozen=True)
class TrainedCritic:
    """A critic with the policy that it was trained beside, whose tokenizer and, for some critics, whose hidden states
    it reads with."""

    critic: Critic
    policy: Policy
    config: Config
    """The run's."""

    def read(
        self, prompts: Sequence[Prompt], responses: Sequence[str], batch_size: int = 32, chat: bool = True
    ) -> list[Reading]:
        """Read responses, each to the prompt at the same place.

        Args:
            prompts: texts, or lists of messages such as `[{"role": "user", "content": "..."}]`.
            responses: texts without the end token; an empty one gives the value of the prompt.
            batch_size: responses that are read at once.
            chat: whether a prompt that is a text is the words of a user where the tokenizer has a chat template;
                False: it stands as it is, as in a run whose prompts were texts.

        Returns:
            A reading for each response, in their order.

        Raises:
            InputError: not as many prompts as responses, or one that does not fit the model's context.
        """
        if len(prompts) != len(responses):
            raise InputError(f"{len(prompts)} prompts for {len(responses)} responses: give a prompt for each response")
        episodes = [self._episode(i, *pair, chat) for i, pair in enumerate(zip(prompts, responses, strict=True))]
        readings: list[Reading | None] = [None] * len(episodes)
        # Of like length together: padding costs time.
        order = sorted(range(len(episodes)), key=lambda i: len(episodes[i].prompt_tokens) + len(episodes[i].tokens))
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            for place, reading in zip(places, self._read([episodes[i] for i in places]), strict=True):
                readings[place] = reading
        return [reading for reading in readings if reading is not None]

    def scores(
        self, prompts: Sequence[Prompt], responses: Sequence[str], batch_size: int = 32, chat: bool = True
    ) -> list[float]:
        """The expected return of each response; arguments as of `read`."""
        return [reading.value for reading in self.read(prompts, responses, batch_size, chat)]

    def _episode(self, place: int, prompt: Prompt, response: str, chat: bool) -> Episode:
        encoder = ChatEncoder(self.policy.tokenizer, self.policy.template)
        if isinstance(prompt, str) and chat and self.policy.tokenizer.chat_template is not None:
            prompt = [{"role": "user", "content": prompt}]
        episode = Episode(Example(str(place), prompt), 0, 0, encoder.prompt(prompt), encoder.plain(response))
        if not episode.prompt_tokens:
            raise InputError(f"prompt {place} is empty: leave it out")
        length, room = len(episode.prompt_tokens) + len(episode.tokens), self.policy.context_length
        if length > room:
            raise InputError(
                f"prompt and response {place} have {length} tokens, more than the model's context of {room}: shorten "
                "them"
            )
        episode.turns, episode.logprobs = [0] * len(episode.tokens), [0.0] * len(episode.tokens)
        return episode

    @torch.no_grad()
    def _read(self, episodes: Sequence[Episode]) -> list[Reading]:
        # The state behind the last token needs no token there; a batch of empty responses needs a column.
        padded = [replace(e, tokens=e.tokens or [self.policy.pad_id], turns=e.turns or [-1]) for e in episodes]
        padded = [replace(e, logprobs=e.logprobs or [0.0]) for e in padded]
        count, width = len(padded), max(len(e.tokens) for e in padded)
        unknown_B = torch.full((count,), float("nan"))
        rewarded_B = torch.zeros(count, dtype=torch.bool)
        scores = {"rewards_BT": torch.zeros(count, width), "rewarded_B": rewarded_B, "observed_B": unknown_B}
        rollout = collate(padded, {**scores, "true_B": unknown_B}, self.policy.pad_id, policy_version=0)
        rollout = rollout.to(self.policy.device)
        temperature = self.config.sampling.temperature
        if self.config.critic.features:
            rollout = with_features(rollout, self.policy, temperature)
        states_BUD = self.critic.states(rollout, self.policy)
        heads_BUNM = self.critic.values(states_BUD, rollout, self.policy, temperature).cpu()
        encoder = ChatEncoder(self.policy.tokenizer, self.policy.template)
        return [
            Reading(tuple(token_texts(encoder, e.tokens, e.turns)), heads_UNM[: len(e.tokens) + 1])
            for e, heads_UNM in zip(episodes, heads_BUNM, strict=True)
        ]


def load_critic(source: str | Path, device: str | None = None) -> TrainedCritic:
    """Load a trained critic for use by itself.

    Args:
        source: a run folder (its newest sound checkpoint is taken), a `checkpoint-N` folder in one, or the `critic/` in
            that. The bare module is `dvpo.critic.load_critic(checkpoint / "critic")`.
        device: where it works; None: as the run's config says.

    Raises:
        InputError: no sound checkpoint, an algorithm without a critic, a critic that reads more than texts.
    """
    source = Path(source)
    folder = sound_checkpoint(source.parent if source.parent.name.startswith("checkpoint-") else source)
    config = load_config(folder.parent / "config.yaml")
    if not (folder / "critic").is_dir():
        raise InputError(f"{folder} has no critic, since algorithm = {config.algorithm} trains none: take another run")
    if config.critic.privileged:
        raise InputError(
            f"the critic of {folder} reads the column {config.critic.privileged} beside the text (critic.privileged), "
            "which texts alone do not have: take a run without it"
        )
    policy = open_trained(folder, config, device)
    return TrainedCritic(open_trained_critic(folder, policy), policy, config)


@torch.no_grad()
def with_features(rollout: Rollout, policy: Policy, temperature: float) -> Rollout:
    """The rollout with log-probs and entropies of its tokens under the policy: a given response was never drawn."""
    mask_BT = rollout.mask_BT
    figures = torch.zeros(2, *mask_BT.shape, device=policy.device)
    if mask_BT.any():
        figures[:, mask_BT] = torch.stack(policy.response_logprobs(rollout, mask_BT, temperature))
    return replace(rollout, sampler_logprobs_BT=figures[0], entropies_BT=figures[1])
