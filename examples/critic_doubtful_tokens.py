"""Doubtful tokens: where in an answer does the critic's value fall most, and is that where the mistake is?

    python examples/critic_doubtful_tokens.py RUN [PROMPTS] [SPLIT]

RUN is the folder of a run with a critic on the embedded task `math`, as `dvpo demo` makes one: answers to it are worked
out step by step (`23+8=31;31-5=26;#26`), so that the first wrong step of a wrong answer is known.
"""

import re
import sys

import numpy as np

from dvpo import load_critic
from dvpo.evaluate import take
from dvpo.policy import open_policy
from dvpo.stats import paired_difference
from dvpo.tasks.named import make_task
from dvpo.trained import refuse_what_python_gave
from dvpo.warmstart import starting_model

SHOWN = 5


def main(run: str, prompts: int = 200, split: str = "id") -> None:
    critic = load_critic(run)
    refuse_what_python_gave(run, critic.config, "task")
    task = make_task(critic.config.task)
    writer = open_policy(starting_model(critic.config), critic.policy.device, critic.config.model.dtype, learns=False)
    episodes, _ = take(writer, task, task.split(split)[:prompts], critic.config.sampling, 1, seed=0)
    readings = critic.read([e.example.prompt for e in episodes], [e.text for e in episodes])

    hits, chances = [], []
    for reading in readings:
        text = "".join(reading.tokens)
        mistake = first_mistake(text)
        if mistake is None or len(reading.tokens) != len(text):  # one token a character: the embedded tokenizer's
            continue
        doubtful = int(reading.changes_T.argmin())
        hits.append(float(doubtful in mistake))
        chances.append(len(mistake) / len(text))
        if len(hits) <= SHOWN:
            marked = f"{text[:doubtful]}>{text[doubtful]}<{text[doubtful + 1 :]}"
            before, behind = reading.values_U[doubtful : doubtful + 2].tolist()
            print(
                f"{marked:<40} value {before:.2f} -> {behind:.2f}   the mistake: {text[mistake.start : mistake.stop]}"
            )
    if not hits:
        print("no answer with a wrong step: nothing to find")
        return
    gain = paired_difference(hits, chances)
    print(f"in {len(hits)} answers with a wrong step, the value's deepest fall is within the first one in "
          f"{100 * np.mean(hits):.0f}%; a token taken at random, {100 * np.mean(chances):.0f}% (chance); difference "
          f"{100 * gain.mean:+.0f} points [{100 * gain.low:+.0f}, {100 * gain.high:+.0f}]")  # fmt: skip


def first_mistake(text: str) -> range | None:
    """The places of the first step `a+b=c;` that does not hold, its semicolon included."""
    for step in re.finditer(r"(\d+)([+-]\d+)=(\d+);", text):
        if int(step[1]) + int(step[2]) != int(step[3]):
            return range(*step.span())
    return None


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:3]), *sys.argv[3:])
