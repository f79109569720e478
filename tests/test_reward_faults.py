"""Whatever a reward function does, it costs only the guilty sample, and nothing of it is left behind."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from guards import Guard, gone, guards_in, kinds, score


@pytest.fixture
def guard(tmp_path: Path) -> Iterator[Guard]:
    yield from guards_in(tmp_path)


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
    once_more = guard(FLAKY.format(folder=str(tmp_path)), retries=1)
    assert kinds(score(once_more, ["never"])) == [("exception", 0)]
    assert (tmp_path / "1-never").read_text() == "xxx"  # two more: the call and its one retry


def test_a_fault_that_only_the_batch_shows_is_cured_by_asking_one_by_one(guard: Guard) -> None:
    reward = guard("""
        def reward(prompts, completions, completion_ids):
            assert len(prompts) == 1
            return [1.0]
    """)
    scores = score(reward, ["a", "b"])
    assert scores.rewards == [1.0, 1.0]
    assert [(f.kind, f.index, f.cured) for f in scores.faults] == [("exception", None, True)]


COUNTED = """
    from pathlib import Path
    def reward(prompts, completions, completion_ids):
        with open({file!r}, "a") as calls:
            print(len(prompts), file=calls)
        if "bad" in completions:
            raise RuntimeError("bad")
        return [float(c) for c in completions]
"""


def test_one_bad_sample_of_many_is_found_by_halves(guard: Guard, tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    texts = [str(i) for i in range(100)]
    texts[77] = "bad"
    scores = score(guard(COUNTED.format(file=str(calls))), texts)
    assert scores.rewards == [None if i == 77 else float(i) for i in range(100)]
    assert kinds(scores) == [("exception", 77)]
    # 100 fails, 50 holds, 50 fails, 25 holds, 25 fails, 12 holds, 13 fails, then 6, of which 76 to 81 are one by one.
    sizes = [int(size) for size in calls.read_text().split()]
    assert len(sizes) <= 1 + 2 * 4 + 8
    assert sizes[:3] == [100, 50, 50]


def test_a_fault_that_neither_half_shows_is_on_record_once(guard: Guard) -> None:
    reward = guard("""
        def reward(prompts, completions, completion_ids):
            assert len(prompts) < 20
            return [1.0] * len(prompts)
    """)
    scores = score(reward, ["a"] * 20)
    assert scores.rewards == [1.0] * 20
    assert [(f.kind, f.index, f.cured) for f in scores.faults] == [("exception", None, True)]


def test_a_call_holds_about_as_many_samples_as_it_may_and_a_prompts_stay_together(guard: Guard, tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    reward = guard(COUNTED.format(file=str(calls)), most=4)
    prompts = ["a"] * 3 + ["b"] * 3 + ["c"] * 3
    scores = reward(prompts, [str(i) for i in range(9)], [[7]] * 9, {})
    assert scores.rewards == [float(i) for i in range(9)]
    assert calls.read_text().split() == ["3", "3", "3"]


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


@pytest.mark.parametrize("rubbish", [b"{}", b'{"number": 1, "rewards": [9.0]}'])  # the second is to another request
def test_rubbish_in_the_pipe_of_the_replies_ends_the_worker_and_not_the_run(guard: Guard, rubbish: bytes) -> None:
    reward = guard(f"""
        import os
        def reward(prompts, completions, completion_ids):
            if completions == ["ok"]:
                return [1.0]
            for descriptor in range(3, 12):
                try:
                    os.write(descriptor, ({len(rubbish)}).to_bytes(8, "big") + {rubbish!r})
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
