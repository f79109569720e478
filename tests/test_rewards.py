"""A reward function gets what TRL gives it, alone, in a pool or async; most here are imported from a file."""

import asyncio
import errno
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dvpo.errors import InputError
from dvpo.reward_lane import Lane
from dvpo.rewards import Fault, GuardedReward, Scores, _cuts, headline, longest_call
from guards import Guard, guards_in, kinds, score


@pytest.fixture
def guard(tmp_path: Path) -> Iterator[Guard]:
    yield from guards_in(tmp_path)


# What a function gets and gives.


def test_sync_function_gets_every_argument_as_trl_passes_it(guard: Guard) -> None:
    reward = guard("""
        def reward(prompts, completions, completion_ids, answer, **columns):
            assert prompts == ["2+2=", "2+2="] and completion_ids == [[7, 8], [7, 8]]
            assert columns == {"level": [1, 2]}, columns
            return [float(c == a) for c, a in zip(completions, answer)]
    """)
    assert score(reward, ["4", "5"], answer=["4", "4"], level=[1, 2]) == Scores([1.0, 0.0], [])


def test_message_prompts_get_message_completions_and_string_prompts_get_strings(guard: Guard) -> None:
    reward = guard("""
        def reward(prompts, completions, completion_ids):
            assert completions[0] == [{"role": "assistant", "content": "four"}], completions
            assert completions[1] == "4", completions
            return [1, 1]
    """)
    chat = [{"role": "user", "content": "2+2?"}]
    assert reward([chat, "2+2="], ["four", "4"], [[7], [8]], {}) == Scores([1.0, 1.0], [])


def test_async_function_keeps_one_event_loop_over_calls(guard: Guard) -> None:
    reward = guard("""
        import asyncio
        loops = set()
        async def reward(prompts, completions, completion_ids):
            loops.add(asyncio.get_running_loop())
            await asyncio.sleep(0)
            return [len(loops)] * len(prompts)
    """)
    assert [score(reward, ["4"]).rewards for _ in range(2)] == [[1.0], [1.0]]


def test_callable_is_sent_with_what_it_closes_over() -> None:
    bonus = 0.25

    async def reward(prompts: Any, completions: Any, completion_ids: Any) -> list[float]:
        await asyncio.sleep(0)
        return [len(c) + bonus for c in completions]

    with GuardedReward(reward) as guarded:
        assert score(guarded, ["4", "44"]) == Scores([1.25, 2.25], [])


def test_numbers_arrays_and_abstentions_are_read_and_a_missing_reward_is_none_not_zero() -> None:
    entries = [1, True, np.float32(0.5), None, float("nan"), [1.0, None, float("nan")], np.array([0.5, 2.0])]
    with GuardedReward(lambda prompts, completions, completion_ids: entries) as reward:
        scores = score(reward, ["x"] * len(entries))
    assert scores == Scores([1.0, 1.0, 0.5, None, None, [1.0, None, None], [0.5, 2.0]], [])


def test_a_whole_array_is_as_good_as_a_list() -> None:
    with GuardedReward(lambda prompts, completions, completion_ids: np.arange(3)) as reward:
        assert score(reward, ["a", "b", "c"]).rewards == [0.0, 1.0, 2.0]


def test_infinite_and_wrong_typed_entries_are_faults_of_their_samples_alone() -> None:
    entries = [1.0, float("-inf"), "good", [0.5, float("inf"), "x"], [[1.0]], 10**400, {"score": 1}]
    with GuardedReward(lambda prompts, completions, completion_ids: entries) as reward:
        scores = score(reward, ["x"] * len(entries))
    assert scores.rewards == [1.0, None, None, [0.5, None, None], [None], None, None]
    assert kinds(scores) == [
        ("non_finite", 1),
        ("wrong_type", 2),
        ("non_finite", 3),
        ("wrong_type", 4),
        ("non_finite", 5),
        ("wrong_type", 6),
    ]


def test_prints_at_every_level_and_reading_stdin_cannot_corrupt_the_conversation(guard: Guard) -> None:
    reward = guard("""
        import os, subprocess, sys
        def reward(prompts, completions, completion_ids):
            print("from print"); sys.__stdout__.write("from __stdout__\\n"); sys.__stdout__.flush()
            os.write(1, b"from the descriptor\\n"); subprocess.run(["echo", "from a child"], check=True)
            try:
                input()
            except EOFError:
                return [1.0] * len(prompts)
    """)
    assert [score(reward, ["4", "5"]) for _ in range(2)] == [Scores([1.0, 1.0], [])] * 2


def test_an_empty_batch_is_not_sent(guard: Guard) -> None:
    assert score(guard("def reward(prompts, completions, completion_ids): raise AssertionError"), []) == Scores([], [])


def test_a_batch_larger_than_a_pipe_goes_both_ways(guard: Guard) -> None:
    reward = guard("""
        def reward(prompts, completions, completion_ids):
            return [[float(len(c))] * 5000 for c in completions]
    """)
    completions = [str(i) * 30_000 for i in range(20)]
    expected = [[float(len(c))] * 5000 for c in completions]
    assert score(reward, completions) == Scores(expected, [])


# A pool of workers.


def test_workers_share_a_batch_side_by_side_and_a_prompts_completions_stay_together(
    guard: Guard, tmp_path: Path
) -> None:
    reward = guard(
        f"""
        import os, time
        from pathlib import Path
        def reward(prompts, completions, completion_ids):
            Path({str(tmp_path)!r}, f"{{completions[0]}}-{{os.getpid()}}").touch()
            for _ in range(6000):
                if len(list(Path({str(tmp_path)!r}).glob(completions[0] + "-*"))) == 3:
                    return [os.getpid()] * len(prompts)
                time.sleep(0.01)
            raise RuntimeError("no three of us at work at once")
        """,
        workers=3,
        timeout=120,
    )
    prompts = ["a", "a", "b", "b", "b", "b", "c"]
    pids = reward(prompts, ["x"] * 7, [[1]] * 7, {}).rewards
    assert len(set(pids)) == 3
    assert pids == [pids[0]] * 2 + [pids[2]] * 4 + [pids[6]]


def test_faults_of_several_workers_name_the_samples_of_the_whole_batch(guard: Guard) -> None:
    reward = guard(
        """
        import os
        def reward(prompts, completions, completion_ids):
            return [os._exit(1) if c == "dies" else 1 / 0 if c == "raises" else 1.0 for c in completions]
        """,
        workers=2,
    )
    texts = ["ok", "dies", "ok", "ok", "raises", "ok"]
    scores = reward([f"prompt {i}" for i in range(6)], texts, [[1]] * 6, {})
    assert scores.rewards == [1.0, None, 1.0, 1.0, None, 1.0]
    assert kinds(scores) == [("worker_died", 1), ("exception", 4)]


@pytest.mark.parametrize(
    ("prompts", "workers", "expected"),
    [
        ("aabbbbc", 3, [0, 2, 6]),  # wanted: 0, 2.3, 4.7
        ("aaaa", 3, [0]),
        ("abcd", 2, [0, 2]),
        ("ab", 5, [0, 1]),
        ("", 2, []),
    ],
)
def test_where_a_batch_is_cut(prompts: str, workers: int, expected: list[int]) -> None:
    assert _cuts(list(prompts), workers) == expected


def test_an_interrupt_while_workers_are_busy_ends_them_and_the_call_at_once(guard: Guard) -> None:
    reward = guard(
        """
        import time
        def reward(prompts, completions, completion_ids):
            time.sleep(60)
        """,
        workers=2,
    )

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    start = time.monotonic()
    try:
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        with pytest.raises(KeyboardInterrupt):
            reward(["a", "a", "b", "b"], ["x"] * 4, [[1]] * 4, {})
    finally:
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - start < 30


# Async functions, called for each sample.


ASYNC = """
    import asyncio
    running, most, tries = 0, 0, {}
    async def reward(prompts, completions, completion_ids, answer):
        global running, most
        assert len(prompts) == len(completions) == len(completion_ids) == len(answer) == 1
        running += 1
        most = max(most, running)
        text = completions[0]
        tries[text] = tries.get(text, 0) + 1
        try:
            await asyncio.sleep(60 if text == "hangs" else 0.1)
        finally:
            running -= 1
        if text == "raises" or text == "twice" and tries[text] < 2:
            raise RuntimeError("no")
        if text == "exits":
            raise SystemExit(3)
        return {"short": [], "none": None, "inf": [float("inf")]}.get(text, [most])
"""


def test_async_calls_run_side_by_side_up_to_the_bound_each_with_its_own_limit(guard: Guard) -> None:
    reward = guard(ASYNC, concurrency=3, timeout=0.8)
    texts = ["ok", "raises", "hangs", "exits", "short", "none", "inf", *["ok"] * 5]
    start = time.monotonic()
    scores = score(reward, texts, answer=texts)
    assert time.monotonic() - start < 30
    assert scores.rewards[1:7] == [None] * 6
    assert scores.rewards[-1] == 3.0
    assert kinds(scores) == [
        ("exception", 1),
        ("timeout", 2),
        ("exception", 3),
        ("wrong_length", 4),
        ("wrong_type", 5),
        ("non_finite", 6),
    ]


def test_async_samples_that_failed_are_tried_again_and_the_others_are_not(guard: Guard) -> None:
    reward = guard(ASYNC, concurrency=4, retries=1)
    scores = score(reward, ["ok", "twice", "raises"], answer=["", "", ""])
    assert scores.rewards == [3.0, 3.0, None]
    assert [(f.kind, f.index, f.cured) for f in scores.faults] == [("exception", 1, True), ("exception", 2, False)]


def test_a_time_limit_longer_than_a_pipe_can_wait_for_is_kept(guard: Guard) -> None:
    assert score(guard(ASYNC, timeout=1e7), ["ok"], answer=[""]).rewards == [1.0]  # poll() takes 2.1e6 seconds


def test_a_worker_that_cannot_be_started_in_the_middle_of_a_run_is_a_fault(monkeypatch) -> None:
    def exhausted(_: Lane) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Lane, "_running_worker", exhausted)
    failure = Lane("m:f", ".", [], timeout=10, start_timeout=1).ask(b"", token_counts=[1])
    assert failure == ("worker_died", "no process for it: [Errno 24] Too many open files")


def test_as_many_async_calls_as_follow_each_other_have_their_time_and_a_waiting_process_knows_it(monkeypatch) -> None:
    asked: list[float] = []
    worker = SimpleNamespace(exchange=lambda _, seconds, __: asked.append(seconds) or {"each": []})
    monkeypatch.setattr(Lane, "_running_worker", lambda _: worker)
    Lane("m:f", ".", [], timeout=10, start_timeout=1).ask(b"", token_counts=[1] * 5, concurrency=2)
    # 5 samples, 2 at a time: 3 calls follow each other, and half a limit more.
    assert asked == [35] == [longest_call(5, timeout=10, concurrency=2, retries=0)]


def test_an_async_function_that_blocks_its_loop_is_killed_and_costs_the_guilty_sample(guard: Guard) -> None:
    reward = guard(
        """
        import time
        async def reward(prompts, completions, completion_ids):
            if completions == ["blocks"]:
                time.sleep(60)
            return [1.0]
        """,
        concurrency=3,
        timeout=1.0,
    )
    scores = score(reward, ["ok", "blocks", "ok"])
    assert scores.rewards == [1.0, None, 1.0]
    assert kinds(scores) == [("timeout", 1)]


def test_a_function_that_is_not_async_gets_one_call_for_the_batch_whatever_the_concurrency(guard: Guard) -> None:
    reward = guard("def reward(completions, **columns): return [float(len(completions))] * 3", concurrency=2)
    assert score(reward, ["a", "b", "c"]).rewards == [3.0] * 3
    assert reward.concurrency == 0


# What the user can mend is said before the run.


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("my_rewards", "is no name of a function; write it as module:function"),
        ("no_such_module:reward", "No module named 'no_such_module'"),
        ("my_rewards:rewad", "has no attribute 'rewad'"),
        ("my_rewards:CONSTANT", "a int is no function"),
        ("broken:reward", r"ZeroDivisionError: division by zero \(broken.py:2\)"),
        ("leaves:reward", "exit code 3"),
    ],
)
def test_a_function_that_cannot_be_imported_is_an_input_error(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "my_rewards.py").write_text("def reward(**columns): ...\nCONSTANT = 1\n")
    (tmp_path / "broken.py").write_text("def reward(**columns): ...\n1 / 0\n")
    (tmp_path / "leaves.py").write_text("import os\nos._exit(3)\n")
    with pytest.raises(InputError, match=f"^reward.function: '{name}' .*{reason}"):
        GuardedReward(name, path=[str(tmp_path)])


def test_an_import_that_hangs_is_an_input_error_in_time(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(60)\n")
    with pytest.raises(InputError, match=r"^reward.function: 'slow:reward' .*no end within 0.5 s"):
        GuardedReward("slow:reward", path=[str(tmp_path)], start_timeout=0.5)


def test_a_signature_that_does_not_take_the_columns_is_an_input_error(guard: Guard) -> None:
    source = "def reward(prompts, completions, answer): return [1.0]"
    remedy = r"has the signature \(prompts, completions, answer\).*'completion_ids'.*\*\*columns\)$"
    with pytest.raises(InputError, match=remedy):
        guard(source)
    fitting = guard("def reward(prompts, completions, completion_ids, answer): return [1.0]")
    assert fitting.signature == "(prompts, completions, completion_ids, answer)"
    assert fitting.check(["answer"]) == fitting.signature
    with pytest.raises(InputError, match="unexpected keyword argument 'level'"):
        fitting.check(["answer", "level"])
    with pytest.raises(InputError, match="missing a required argument: 'answer'"):
        fitting.check([])
    with pytest.raises(InputError, match=r"; did you mean 'answers', a column of your file\? write it as f\("):
        fitting.check(["level", "answers"])
    with pytest.raises(InputError, match=r"has a column 'completions'.*rename"):
        fitting.check(["completions"])


def test_what_cannot_be_sent_is_an_input_error(guard: Guard) -> None:
    lock = threading.Lock()
    with pytest.raises(InputError, match=r"cannot be sent.*name it as module:function"):
        GuardedReward(lambda prompts, completions, completion_ids: [lock.locked()])
    reward = guard("def reward(**columns): return [1.0]")
    with pytest.raises(InputError, match=r"columns \['log'\] cannot be sent to"):
        score(reward, ["a"], log=[lock])


def test_a_headline_keeps_the_kind_and_the_users_line() -> None:
    long = f"ValueError: {'x' * 1000} (my_rewards.py:3)\n  File ..."
    assert headline(Fault("exception", 0, long)).startswith("ValueError: xx")
    assert headline(Fault("exception", 0, long)).endswith("x (my_rewards.py:3)")
    assert headline(Fault("timeout", 0, "no answer within 1 s")) == "timeout: no answer within 1 s"
