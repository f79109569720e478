"""Best of n: draw n answers, keep the one that the critic expects most of. Is that better than one answer?

    python examples/critic_best_of_n.py RUN [PROMPTS] [N] [SPLIT]

RUN is the folder of a run with a critic on a task whose truth is known, as `dvpo demo` makes one. The answers are drawn
from the policy that the critic was trained beside, to held-out prompts.
"""

import sys
from collections import Counter

import numpy as np
from rich.console import Console
from rich.table import Table

from dvpo import load_critic
from dvpo.evaluate import take
from dvpo.scoring import Scorer
from dvpo.stats import bootstrap_interval
from dvpo.tasks import total
from dvpo.tasks.named import make_task
from dvpo.trained import refuse_what_python_gave


def main(run: str, prompts: int = 200, most: int = 8, split: str = "id") -> None:
    critic = load_critic(run)
    refuse_what_python_gave(run, critic.config, "task")
    task = make_task(critic.config.task)
    examples = task.split(split)[:prompts]
    episodes, _ = take(critic.policy, task, examples, critic.config.sampling, most, seed=0)
    if any(len(episode.messages) > 1 for episode in episodes):
        sys.exit("a conversation is no single answer: take a run on a task of one turn")
    right = np.array([total(reward) for reward in Scorer(task, None).judge(episodes).rewards]).reshape(-1, most)
    texts = np.array([episode.text for episode in episodes], dtype=object).reshape(-1, most)

    # All that the critic is asked: how much it expects of each answer. A prompt that is a string stands as in training.
    questions, given = [episode.example.prompt for episode in episodes], [episode.text for episode in episodes]
    scores = critic.scores(questions, given, chat=False)
    values = np.reshape(scores, right.shape)

    table = Table(title=f"True accuracy (%) over {len(right)} prompts of split {split}, with 95% intervals")
    for column in ("n", "a random one (chance)", "best by the critic", "most frequent answer", "any of them (bound)"):
        table.add_column(column, justify="right")
    for n in (n for n in (1, 2, 4, 8, 16, 32) if n <= most):
        best = np.take_along_axis(right[:, :n], values[:, :n].argmax(axis=1)[:, None], axis=1)[:, 0]
        voted = [row[most_frequent(texts_of_row, task)] for row, texts_of_row in zip(right, texts[:, :n], strict=True)]
        table.add_row(str(n), *map(shown, (right[:, :n].mean(axis=1), best, voted, right[:, :n].max(axis=1))))
    Console(width=110).print(table)


def most_frequent(texts: np.ndarray, task: object) -> int:
    """The place of the first text whose final answer is the most frequent one; texts without one do not vote."""
    final_answer = getattr(task, "final_answer", lambda text: text)
    answers = [final_answer(text) for text in texts]
    votes = Counter(answer for answer in answers if answer is not None)
    return answers.index(votes.most_common(1)[0][0]) if votes else 0


def shown(scores: np.ndarray) -> str:
    low, high = bootstrap_interval(lambda rows: rows[0].mean(), list(scores))
    return f"{100 * np.mean(scores):.1f} [{100 * low:.0f}, {100 * high:.0f}]"


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:4]), *sys.argv[4:])
