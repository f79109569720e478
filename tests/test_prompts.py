"""The prompt stream: passes without replacement, counted visits, and a state of one number."""

import warnings
from collections import Counter

import pytest

from dvpo.errors import InputError
from dvpo.prompts import PromptStream, warn_of_few
from dvpo.settings import TaskConfig
from dvpo.tasks import Example

EXAMPLES = [Example(f"p{i}", str(i)) for i in range(7)]


@pytest.mark.parametrize(
    ("held_out", "more", "words"),
    [
        (1, {}, r"^task.held_out = 0.05: 1 prompt is held out, .* raise it, or name a file of them in task.id_path$"),
        (19, {"id_path": "id.jsonl"}, r"^task.id_path = id.jsonl: 19 prompts are held out, .* add to that file$"),
    ],
)
def test_few_held_out_prompts_are_warned_of_with_the_setting_that_helps(
    held_out: int, more: dict[str, str], words: str
):
    with pytest.warns(UserWarning, match=words):
        warn_of_few([Example(str(i), "") for i in range(held_out)], TaskConfig(name="files", path="a.jsonl", **more))


@pytest.mark.parametrize(("name", "held_out"), [("files", 20), ("files", 0), ("math", 5)])
def test_enough_held_out_prompts_none_wanted_or_an_embedded_task_are_no_matter(name: str, held_out: int):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_few([Example(str(i), "") for i in range(held_out)], TaskConfig(name=name, path="a.jsonl"))


def draw(stream: PromptStream, *counts: int) -> list[tuple[str, int]]:
    return [(example.id, visit) for count in counts for example, visit in stream.next(count)]


def test_every_prompt_comes_once_a_pass_and_its_visit_is_the_number_of_earlier_draws():
    seen: Counter[str] = Counter()
    drawn = draw(PromptStream(EXAMPLES, seed=0), *[3] * 7)
    for prompt, visit in drawn:
        assert visit == seen[prompt]
        seen[prompt] += 1
    assert set(seen.values()) == {3}
    assert [{p for p, _ in drawn[i : i + 7]} for i in (0, 7, 14)] == [{e.id for e in EXAMPLES}] * 3


def test_passes_and_seeds_differ_in_order_and_the_same_seed_repeats_it():
    passes = [p for p, _ in draw(PromptStream(EXAMPLES, seed=0), 21)]
    assert len({tuple(passes[i : i + 7]) for i in (0, 7, 14)}) == 3
    assert draw(PromptStream(EXAMPLES, seed=0), 21) == draw(PromptStream(EXAMPLES, seed=0), 10, 11)
    assert draw(PromptStream(EXAMPLES, seed=0), 7) != draw(PromptStream(EXAMPLES, seed=1), 7)


@pytest.mark.parametrize("before", [0, 1, 6, 7, 8, 20])
def test_a_resumed_stream_goes_on_as_if_nothing_had_happened(before):
    whole = PromptStream(EXAMPLES, seed=3)
    draw(whole, before)
    resumed = PromptStream(EXAMPLES, seed=3)
    draw(resumed, 5)  # whatever it did before
    resumed.load_state_dict(whole.state_dict())
    assert draw(resumed, 9, 9) == draw(whole, 18)


@pytest.mark.parametrize("others", [EXAMPLES[:6], [*EXAMPLES[:6], Example("p9", "9")], EXAMPLES[::-1]])
def test_a_checkpoint_of_other_prompts_is_refused_also_when_there_are_as_many(others: list[Example]):
    with pytest.raises(InputError, match="not those of the checkpoint"):
        PromptStream(EXAMPLES, 0).load_state_dict(PromptStream(others, 0).state_dict())


def test_an_id_that_stands_twice_is_refused():
    with pytest.raises(InputError, match="'p3' stands twice"):
        PromptStream([*EXAMPLES, EXAMPLES[3]], 0)
