"""The responses of a step: sampled, scored, and groups without signal replaced by others (dynamic sampling).

Of several processes each samples its share of the step's prompts. Who draws which is the same for all, so that the step
has the same responses however many there are, and a prompt's responses are never parted.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch

from dvpo.config import Config
from dvpo.distributed import gather_objects, gather_rows, share
from dvpo.encoding import ChatEncoder
from dvpo.faults import fault_rows
from dvpo.metrics import has_signal
from dvpo.prompts import MixedPrompts, PromptStream
from dvpo.rewards import Fault
from dvpo.sampling import Episode, Sampler, play_draws
from dvpo.scoring import Scored, Scorer, join
from dvpo.seeding import derive_seed
from dvpo.tasks import Example, Task


@dataclass(frozen=True)
class Collected:
    """Everything that this process sampled in a step, and which of it the step trains on."""

    sampled: list[Episode]
    """Groups one after the other; those that were replaced are among them."""
    scored: Scored
    """Of all that was sampled."""
    kept: list[int]
    """Rows of the above, group by group."""
    sampling_seconds: float
    scoring_seconds: float

    @property
    def episodes(self) -> list[Episode]:
        return [self.sampled[row] for row in self.kept]

    def completions(self, count: int) -> list[dict[str, Any]]:
        """Responses of the step, of all processes, as the log shows them: one of each prompt before any second."""
        observed, true = self.scored.fields["observed_B"], self.scored.fields["true_B"]
        rows = [
            {**self.sampled[row].record(), "observed": float(observed[row]), "true": float(true[row])}
            for row in sorted(self.kept, key=lambda row: self.sampled[row].sample)[:count]
        ]
        return sorted(gather_rows(rows), key=lambda row: row["sample"])[:count]

    def faults(self) -> tuple[list[Fault], int]:
        """What went wrong with the rewards of all processes, and how much they sampled: indices count through it."""
        parts = gather_objects((self.scored.faults, len(self.sampled)))
        firsts = accumulate((sampled for _, sampled in parts), initial=0)
        faults = [
            fault if fault.index is None else replace(fault, index=first + fault.index)
            for (own, _), first in zip(parts, firsts, strict=False)
            for fault in own
        ]
        return faults, sum(sampled for _, sampled in parts)

    def fault_records(self) -> list[dict[str, Any]]:
        """What went wrong with the rewards of anything that any process sampled, as the log shows it."""
        return gather_rows(fault_rows(self.scored.faults, self.sampled))


class Collector:
    """Draws prompts, plays `samples_per_prompt` episodes of each, scores them.

    A group has signal if at least two of its responses have a reward and their returns are not all equal: without one
    no baseline of the group gives an advantage. Such a group is replaced by one of the next prompt, in at most
    `sampling.resample_rounds` rounds; what is without signal then stays, so that a step always has as many responses.
    A prompt that was drawn counts as visited, whatever became of its group.

    Source: dynamic sampling of DAPO, Yu et al. 2025, arXiv 2503.14476, which goes on until the batch is full.
    """

    def __init__(
        self,
        task: Task,
        prompts: PromptStream | MixedPrompts,
        prompt_tokens: Mapping[str, Sequence[int]],
        encoder: ChatEncoder,
        sampler: Sampler,
        scorer: Scorer,
        config: Config,
    ) -> None:
        self.task, self.prompts, self.prompt_tokens = task, prompts, prompt_tokens
        self.encoder, self.sampler, self.scorer = encoder, sampler, scorer
        self.settings, self.seed = config.sampling, derive_seed(config.seed, "sample")
        self._cut_count = config.advantage.truncation != "mask"

    def collect(self) -> Collected:
        """The responses of the next step."""
        size, sampling, scoring = self.settings.samples_per_prompt, 0.0, 0.0
        sampled: list[Episode] = []
        parts: list[Scored] = []
        own = share(self.settings.prompts_per_step)
        groups: dict[int, range] = {}
        silent = list(range(self.settings.prompts_per_step))
        for _ in range(1 + self.settings.resample_rounds):
            # Every process draws for all of them, and so knows what comes next.
            draws = dict(zip(silent, self.prompts.next(len(silent)), strict=True))
            places = [place for place in silent if place in own]
            if places:
                started = time.perf_counter()
                episodes = self.sample([draws[place] for place in places])
                drawn = time.perf_counter()
                parts.append(self.scorer(episodes))
                sampling, scoring = sampling + drawn - started, scoring + time.perf_counter() - drawn
                for number, place in enumerate(places):
                    first = len(sampled) + number * size
                    groups[place] = range(first, first + size)
                counting_B = torch.tensor([e.terminated or self._cut_count for e in episodes])
                observed_B = parts[-1].fields["observed_B"].where(counting_B, torch.nan)
                observed = observed_B.split(size)
                places = [place for place, rewards in zip(places, observed, strict=True) if not has_signal(rewards)]
                sampled += episodes
            if self.settings.resample_rounds:
                silent = gather_rows(places)
            if not silent:
                break
        return Collected(sampled, join(parts), [row for place in own for row in groups[place]], sampling, scoring)

    def sample(self, draws: Sequence[tuple[Example, int]]) -> list[Episode]:
        """Play `samples_per_prompt` episodes of each of these prompts, given with their visits."""
        episodes, _ = play_draws(
            self.task,
            draws,
            self.settings.samples_per_prompt,
            self.prompt_tokens,
            self.encoder,
            self.sampler,
            self.settings,
            self.seed,
        )
        return episodes
