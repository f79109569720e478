"""A reward function may do anything and the guard must hold; most functions here are imported from a file."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dvpo.errors import InputError
from dvpo.rewards import GuardedReward, Scores, _cuts

Guard = Callable[..., GuardedReward]


@pytest.fixture
def guard(tmp_path: Path) -> Iterator[Guard]:
    """Make a guarded reward from the source of a function named `reward`, and close it after the test."""
    made: list[GuardedReward] = []

    def make(source: str, **options: Any) -> GuardedReward:
        (tmp_path / "my_rewards.py").write_text(textwrap.dedent(source))
        made.append(GuardedReward("my_rewards:reward", path=[tmp_path], **options))
        return made[-1]

    yield make
    for reward in made:
        reward.close()


def score(reward: GuardedReward, completions: list[str], **columns: Any) -> Scores:
    size = len(completions)
    return reward(["2+2="] * size, completions, [[7, 8]] * size, columns)


def kinds(scores: Scores) -> list[tuple[str, int | None]]:
    return [(fault.kind, fault.index) for fault in scores.faults]


def gone(pid: int, seconds: float = 30.0) -> bool:
    """Has the process ended (or become a zombie that only waits to be reaped) within the time?"""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False


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


# Faults: only the guilty sample loses its reward.


def test_an_exception_costs_only_the_guilty_sample_and_shows_its_traceback(guard: Guard) -> None:
    reward = guard("""
        def reward(prompts, completions, completion_ids):
            return [float(int(c)) for c in completions]
    """)
    scores = score(reward, ["4", "four", "0"])
    assert scores.rewards == [4.0, None, 0.0]
    assert kinds(scores) == [("exception", 1)]
    first, *calls = scores.faults[0].message.splitlines()
    assert first == "ValueError: invalid literal for int() with base 10: 'four' (my_rewards.py:3)"
    assert any("my_rewards.py" in line for line in calls)


def test_a_fault_names_the_users_line_and_neither_the_librarys_nor_markers(guard: Guard) -> None:
    reward = guard("""
        import json
        def reward(completions, **columns):
            return [json.loads(c)["reward"] for c in completions]
    """)
    message = score(reward, ["{"]).faults[0].message
    assert message.startswith("json.decoder.JSONDecodeError: ")
    assert re.search(r"\(my_rewards\.py:\d+\)$", message.splitlines()[0])
    assert not any(line.strip() and not line.strip(" ^~") for line in message.splitlines())
    assert "decoder.py" in message
    assert "reward_worker.py" not in message


@pytest.mark.parametrize(
    ("crash", "manner"),
    [("os._exit(3)", "exit code 3"), ("ctypes.string_at(0)", "SIGSEGV"), ("sys.exit(1)", "SystemExit")],
)
def test_a_crash_costs_only_the_guilty_sample(guard: Guard, crash: str, manner: str) -> None:
    reward = guard(f"""
        import ctypes, os, sys
        def reward(prompts, completions, completion_ids):
            return [{crash} if c == "bad" else 1.0 for c in completions]
    """)
    scores = score(reward, ["ok", "bad", "ok"])
    assert scores.rewards == [1.0, None, 1.0]
    assert kinds(scores) == [("exception" if manner == "SystemExit" else "worker_died", 1)]
    assert manner in scores.faults[0].message


@pytest.mark.parametrize(
    "hang",
    [
        "__import__('time').sleep(60)",
        "__import__('re').match('(a*)*b', 'a' * 40)",  # holds the interpreter lock: no thread could stop it
    ],
)
def test_a_hang_is_killed_in_time_and_costs_only_the_guilty_sample(guard: Guard, hang: str) -> None:
    reward = guard(
        f"""
        def reward(prompts, completions, completion_ids):
            return [{hang} if c == "bad" else 1.0 for c in completions]
        """,
        timeout=0.5,
    )
    start = time.monotonic()
    scores = score(reward, ["ok", "bad", "ok"])
    assert time.monotonic() - start < 30
    assert scores.rewards == [1.0, None, 1.0]
    assert kinds(scores) == [("timeout", 1)]


def test_after_three_time_outs_in_a_row_the_rest_is_not_tried(guard: Guard, tmp_path: Path) -> None:
    reward = guard(
        f"""
        import time
        def reward(prompts, completions, completion_ids):
            open({str(tmp_path / "calls")!r}, "a").write(f"{{len(prompts)}} ")
            time.sleep(60)
        """,
        timeout=0.5,
    )
    scores = score(reward, ["x"] * 50)
    assert scores.rewards == [None] * 50
    assert kinds(scores) == [("timeout", index) for index in range(50)]
    assert (tmp_path / "calls").read_text().split() == ["50", "1", "1", "1"]


def test_the_retries_of_a_batch_have_a_time_limit_whatever_the_pattern(guard: Guard) -> None:
    # Two hangs, one answer, two hangs, ...: never three in a row. Ten limits are used up after ten hangs.
    reward = guard(
        """
        import time
        def reward(prompts, completions, completion_ids):
            return [1.0 if int(c) % 3 == 2 else time.sleep(60) for c in completions]
        """,
        timeout=0.4,
    )
    start = time.monotonic()
    scores = score(reward, [str(i) for i in range(60)])
    assert time.monotonic() - start < 30
    assert scores.rewards[:3] == [None, None, 1.0]
    assert scores.rewards[-1] is None
    assert scores.faults[-1].message.startswith("not tried")


@pytest.mark.parametrize("answer", ["[float(c) for c in set(completions)]", "[1.0]"])
def test_an_answer_of_the_wrong_length_is_not_retried_into_a_right_one(guard: Guard, answer: str) -> None:
    reward = guard(f"def reward(prompts, completions, completion_ids): return {answer}")
    scores = score(reward, ["1", "1", "2"])
    assert scores.rewards == [None, None, None]
    assert kinds(scores) == [("wrong_length", 0), ("wrong_length", 1), ("wrong_length", 2)]
    assert scores.faults[0].message in ("returned 2 entries for 3 completions", "returned 1 entries for 3 completions")


def test_a_wrong_length_even_for_single_samples_leaves_no_reward_and_a_fault_each(guard: Guard) -> None:
    reward = guard("def reward(prompts, completions, completion_ids): return [1.0] * (len(prompts) + 1)")
    scores = score(reward, ["a", "b"])
    assert scores.rewards == [None, None]
    assert kinds(scores) == [("wrong_length", 0), ("wrong_length", 1)]


@pytest.mark.parametrize(("value", "name"), [("None", "NoneType"), ("1.0", "float"), ("{'a': 1}", "dict")])
def test_a_return_that_is_no_list_is_a_wrong_type(guard: Guard, value: str, name: str) -> None:
    reward = guard(f"def reward(prompts, completions, completion_ids): return {value}")
    scores = score(reward, ["a"])
    assert scores.rewards == [None]
    assert kinds(scores) == [("wrong_type", 0)]
    assert name in scores.faults[0].message


def test_a_function_that_cannot_be_imported_again_after_a_crash_does_not_end_the_run(
    guard: Guard, tmp_path: Path
) -> None:
    reward = guard("""
        import os
        def reward(prompts, completions, completion_ids):
            os._exit(1)
    """)
    (tmp_path / "my_rewards.py").write_text("this is no Python")
    scores = score(reward, ["a", "b"])
    assert scores.rewards == [None, None]
    assert kinds(scores) == [("worker_died", 0), ("worker_died", 1)]


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


# Retries.


FLAKY = """
    from pathlib import Path
    def reward(prompts, completions, completion_ids):
        calls = Path({folder!r}) / f"{{len(prompts)}}-{{completions[0]}}"
        calls.write_text(calls.read_text() + "x" if calls.exists() else "x")
        for c in completions:
            if c == "never" or c == "third" and (len(prompts) > 1 or len(calls.read_text()) < 3):
                raise RuntimeError("the judge is busy")
        return [1.0] * len(prompts)
"""


def test_a_sample_is_tried_again_as_often_as_allowed_and_a_cured_fault_is_on_record(
    guard: Guard, tmp_path: Path
) -> None:
    reward = guard(FLAKY.format(folder=str(tmp_path)), retries=2)
    scores = score(reward, ["ok", "third", "never"])
    assert scores.rewards == [1.0, 1.0, None]
    assert [(f.kind, f.index, f.cured) for f in scores.faults] == [("exception", 1, True), ("exception", 2, False)]
    assert {p.name: len(p.read_text()) for p in tmp_path.glob("1-*")} == {"1-ok": 1, "1-third": 3, "1-never": 3}


def test_a_single_sample_is_not_asked_twice_unless_retries_are_allowed(guard: Guard, tmp_path: Path) -> None:
    reward = guard(FLAKY.format(folder=str(tmp_path)))
    assert kinds(score(reward, ["never"])) == [("exception", 0)]
    assert (tmp_path / "1-never").read_text() == "x"


def test_a_fault_that_only_the_batch_shows_is_cured_by_asking_one_by_one(guard: Guard) -> None:
    reward = guard("""
        def reward(prompts, completions, completion_ids):
            assert len(prompts) == 1
            return [1.0]
    """)
    scores = score(reward, ["a", "b"])
    assert scores.rewards == [1.0, 1.0]
    assert [(f.kind, f.index, f.cured) for f in scores.faults] == [("exception", None, True)]


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


def test_side_by_side_calls_of_a_function_that_is_not_async_are_an_input_error(guard: Guard) -> None:
    with pytest.raises(InputError, match=r"is no async function, so reward\.concurrency = 2"):
        guard("def reward(**columns): return [1.0]", concurrency=2)


# Floods.


def test_a_reply_beyond_all_sense_is_cut_off_and_costs_only_the_guilty_sample(guard: Guard) -> None:
    reward = guard("""
        def reward(prompts, completions, completion_ids):
            return [1.0] * (500_000 if "flood" in completions else len(completions))
    """)
    scores = score(reward, ["ok", "flood", "ok"])
    assert scores.rewards == [1.0, None, 1.0]
    assert kinds(scores) == [("output_flood", 1)]


def test_an_endless_message_of_an_exception_is_cut(guard: Guard) -> None:
    reward = guard("def reward(**columns): raise ValueError('x' * 10_000_000 + ' the end')")
    [fault] = score(reward, ["a"]).faults
    first = fault.message.splitlines()[0]
    assert fault.kind == "exception"
    assert len(fault.message) <= 4000
    assert first.startswith("ValueError: xxx")
    assert " ... xxx" in first
    assert re.search(r"x the end \(my_rewards\.py:\d+\)$", first)


@pytest.mark.parametrize(
    ("end", "timeout"), [("return [1.0] * len(prompts)", 30.0), ("while True: print('more ' * 1000)", 1.5)]
)
def test_what_is_printed_is_passed_on_up_to_a_bound_and_never_blocks_the_call(
    guard: Guard, end: str, timeout: float, capfd: pytest.CaptureFixture[str]
) -> None:
    reward = guard(
        f"""
        def reward(prompts, completions, completion_ids):
            print("seen")
            print("flood " * 2_000_000)
            {end}
        """,
        timeout=timeout,
    )
    scores = score(reward, ["a"])
    assert kinds(scores) == ([] if "return" in end else [("timeout", 0)])
    printed = capfd.readouterr().err
    assert "seen" in printed
    assert "prints more than is shown" in printed
    assert len(printed) < 100_000


def test_rubbish_in_the_pipe_of_the_replies_ends_the_worker_and_not_the_run(guard: Guard) -> None:
    reward = guard("""
        import os
        def reward(prompts, completions, completion_ids):
            if completions == ["ok"]:
                return [1.0]
            for descriptor in range(3, 12):
                try:
                    os.write(descriptor, (2).to_bytes(8, "big") + b"{}")
                except OSError:
                    pass
            return [2.0] * len(completions)
    """)
    scores = score(reward, ["bad"])
    assert scores.rewards == [None]
    assert kinds(scores) == [("worker_died", 0)]
    assert score(reward, ["ok"]).rewards == [1.0]


# Nothing is left behind.


def test_a_time_out_kills_what_the_function_started(guard: Guard, tmp_path: Path) -> None:
    reward = guard(
        f"""
        import subprocess, time
        def reward(prompts, completions, completion_ids):
            child = subprocess.Popen(["sleep", "60"])
            open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
            time.sleep(60)
        """,
        timeout=2.0,
    )
    assert kinds(score(reward, ["a"])) == [("timeout", 0)]
    assert gone(int((tmp_path / "pid").read_text()))


SPINNING = """
import os, re, sys
sys.path.insert(0, {src!r})
from dvpo.rewards import GuardedReward

def reward(prompts, completions, completion_ids):
    os.write(2, b"%d\\n" % os.getpid())
    re.match("(a*)*b", "a" * 40)      # for ages, and with the interpreter lock held

GuardedReward(reward)(["p"], ["c"], [[1]], {{}})
"""


def test_killing_the_run_ends_a_worker_that_spins_in_c_code(tmp_path: Path) -> None:
    # There is no main guard either: a worker made by multiprocessing's spawn would run this script again.
    script = tmp_path / "run.py"
    script.write_text(SPINNING.format(src=str(Path(__file__).parents[1] / "src")))
    with subprocess.Popen([sys.executable, str(script)], stderr=subprocess.PIPE, text=True) as run:
        assert run.stderr is not None
        worker = int(run.stderr.readline())
        os.kill(run.pid, signal.SIGKILL)
        assert gone(worker)


@pytest.mark.parametrize("ending", ["", "raise SystemExit(1)", "guarded.close()"])
def test_a_run_that_ends_leaves_no_worker(tmp_path: Path, ending: str) -> None:
    script = f"""
        import os, sys, threading, time
        sys.path.insert(0, {str(Path(__file__).parents[1] / "src")!r})
        from dvpo.rewards import GuardedReward
        def reward(prompts, completions, completion_ids):
            threading.Thread(target=time.sleep, args=(60,)).start()
            return [float(os.getpid())]
        guarded = GuardedReward(reward)
        print(int(guarded(["p"], ["c"], [[1]], {{}}).rewards[0]), flush=True)
        {ending}
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, check=False)
    assert gone(int(run.stdout), seconds=1.0)


def test_neither_the_run_nor_the_worker_imports_torch_for_it() -> None:
    script = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parents[1] / "src")!r})
        from dvpo.rewards import GuardedReward
        def reward(prompts, completions, completion_ids):
            return [float("torch" in sys.modules)]
        print("torch" in sys.modules, GuardedReward(reward)(["p"], ["c"], [[1]], {{}}).rewards)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, check=True, text=True)
    assert run.stdout.split() == ["False", "[0.0]"]


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
