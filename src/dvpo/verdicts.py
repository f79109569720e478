"""What a warm start has taught: how often the embedded model is right, and whether its verdicts follow the truth."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dvpo.embedded import BAD, GOOD
from dvpo.evaluate import CORRECT, own_figures, take
from dvpo.loading import load_config
from dvpo.policy import Policy
from dvpo.sampling import Episode, pad_right
from dvpo.scoring import Scorer
from dvpo.tasks import Task, total

SEED = 0
"""Of the samples that are measured."""

BATCH = 256
"""Sequences whose verdicts are read together."""


def verdict(logits: Tensor, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The log-odds of a right end, `<|good|>` minus `<|bad|>`: [..., V] -> [...]."""
    good, bad = tokenizer.convert_tokens_to_ids([GOOD, BAD])
    return logits[..., good] - logits[..., bad]


@torch.no_grad()
def measure(policy: Policy, task: Task, samples: int = 8) -> dict[str, dict[str, float]]:
    """Measure accuracy (greedy, sampled at temperature 1, best of `samples`) and the verdicts on the samples.

    Returns:
        For `id` and `ood`: `greedy`, `sampled`, `pass_at_k`, `finished` (share of samples that end by themselves),
        the task's own figures of the samples if it has some, and for the verdicts at the prompt (`first`), half-way
        and before the last token (`last`): `auroc_*`, `corr_*`.
    """
    settings = load_config({"task": {"name": task.name}}).sampling
    judge = Scorer(task, None).judge
    results = {}
    for split in ("id", "ood"):
        examples = task.split(split)
        greedy, _ = take(policy, task, examples, settings, 1, SEED, greedy=True)
        sampled, environments = take(policy, task, examples, settings, samples, SEED)
        own = own_figures(sampled, environments)
        right_B, correct_B = (
            torch.tensor([float(total(reward) >= CORRECT) for reward in judge(episodes).rewards])
            for episodes in (greedy, sampled)
        )
        results[split] = {
            "greedy": right_B.mean().item(),
            "sampled": correct_B.mean().item(),
            "pass_at_k": correct_B.view(-1, samples).amax(1).mean().item(),
            "finished": sum(episode.terminated for episode in sampled) / len(sampled),
            **{name: sum(one[name] for one in own) / len(own) for name in own[0]},
            **judge_verdicts(read_verdicts(policy, sampled), correct_B),
        }
    return {split: {name: round(value, 4) for name, value in row.items()} for split, row in results.items()}


def read_verdicts(policy: Policy, episodes: Sequence[Episode]) -> dict[str, Tensor]:
    """The verdict on each episode at its first, middle and last place, each [B]."""
    rows = [episode.prompt_tokens + episode.tokens for episode in episodes]
    parts = []
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        # Padding is on the right, where causal attention cannot see it: no attention mask is needed.
        ids_BS = pad_right(part, policy.tokenizer.pad_token_id, torch.long, max(map(len, part)))
        verdict_BS = verdict(policy.model(ids_BS).logits, policy.tokenizer)
        first_B = torch.tensor([len(episode.prompt_tokens) - 1 for episode in episodes[start : start + BATCH]])
        last_B = torch.tensor([len(row) - 2 for row in part])
        places_B3 = torch.stack([first_B, (first_B + last_B) // 2, last_B], dim=1)
        parts.append(verdict_BS.gather(1, places_B3))
    return dict(zip(("first", "middle", "last"), torch.cat(parts).unbind(1), strict=True))


def judge_verdicts(verdicts: dict[str, Tensor], correct_B: Tensor) -> dict[str, float]:
    """The area under the ROC curve of each place's verdict, and the correlation of its probability, with the truth."""
    figures = {}
    for place, verdict_B in verdicts.items():
        right, wrong = verdict_B[correct_B == 1], verdict_B[correct_B == 0]
        beats = (right[:, None] > wrong).float() + (right[:, None] == wrong).float() / 2
        figures[f"auroc_{place}"] = beats.mean().item() if beats.numel() else math.nan
        both = torch.stack([verdict_B.sigmoid(), correct_B])
        figures[f"corr_{place}"] = torch.corrcoef(both)[0, 1].nan_to_num(0.0).item()
    return figures
