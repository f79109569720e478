"""Rerank: does a trained critic put right answers before wrong ones?

    python examples/critic_rerank.py RUN [PROMPTS] [ANSWERS] [SPLIT]

RUN is the folder of a run with a critic on a task whose truth is known, as `dvpo demo` makes one. The answers that are
put in order are those of the model that the run began with, to held-out prompts; anybody's would do.
"""

import sys
from collections.abc import Sequence
from itertools import product

import numpy as np

from dvpo import load_critic
from dvpo.evaluate import take
from dvpo.policy import open_policy
from dvpo.scoring import Scorer
from dvpo.stats import bootstrap_interval, paired_difference
from dvpo.tasks import total
from dvpo.tasks.named import make_task
from dvpo.trained import refuse_what_python_gave
from dvpo.warmstart import starting_model


def main(run: str, prompts: int = 200, answers: int = 4, split: str = "id") -> None:
    critic = load_critic(run)
    refuse_what_python_gave(run, critic.config, "task")
    task = make_task(critic.config.task)
    examples = task.split(split)[:prompts]
    writer = open_policy(starting_model(critic.config), critic.policy.device, critic.config.model.dtype, learns=False)
    episodes, _ = take(writer, task, examples, critic.config.sampling, answers, seed=0)
    if any(len(episode.messages) > 1 for episode in episodes):
        sys.exit("a conversation is no single answer: take a run on a task of one turn")
    right = np.array([total(reward) for reward in Scorer(task, None).judge(episodes).rewards]).reshape(-1, answers)

    # All that the critic is asked: how much it expects of each answer. A prompt that is a string stands as in training.
    questions, given = [episode.example.prompt for episode in episodes], [episode.text for episode in episodes]
    scores = critic.scores(questions, given, chat=False)

    by_score = np.take_along_axis(right, np.argsort(-np.reshape(scores, right.shape), axis=1), axis=1)
    at_random = right.mean(axis=1)
    print(f"{len(right)} prompts, {answers} answers each; true accuracy of the answer at each place (%):")
    for place in range(answers):
        print(f"  place {place + 1} by the critic  {shown(by_score[:, place])}")
    print(f"  taken at random        {100 * at_random.mean():5.1f}  (chance)")
    print(f"  right one if any       {100 * right.max(axis=1).mean():5.1f}  (no order can do better)")
    gain = paired_difference(by_score[:, 0], at_random)
    print(f"first place less chance: {100 * gain.mean:+.1f} points [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]")

    values = np.reshape(scores, right.shape)
    pairs = [
        [(a > b) + (a == b) / 2 for a, b in product(row[good == 1], row[good == 0])]
        for row, good in zip(values, right, strict=True)
    ]
    shares = [float(np.mean(ordered)) for ordered in pairs if ordered]
    if shares:
        print(f"pairs of a right and a wrong answer in order: {shown(shares)}% over the {len(shares)} prompts "
              "that have both; chance 50%")  # fmt: skip


def shown(scores: Sequence[float] | np.ndarray) -> str:
    """The mean in per cent with its 95% interval over prompts."""
    low, high = bootstrap_interval(lambda rows: rows[0].mean(), list(scores))
    return f"{100 * np.mean(scores):5.1f} [{100 * low:.1f}, {100 * high:.1f}]"


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:4]), *sys.argv[4:])
