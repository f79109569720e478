r"""The reward `math_verify`: one boxed answer, equal to the reference answer by the package math-verify.

It runs in the reward function's process (`dvpo.rewards`), for math-verify can hang for ever: a hang is killed there,
and costs the sample its reward. math-verify looks for *some* expression and takes "1 2 3" or `\boxed{4=3}` for 3, so
the rules below come first. What it then compares is values: `7 \times 8` is as right as 56, and a prompt that states
its answer as an expression should not be used with it.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

from math_verify import parse, verify
from math_verify.errors import TimeoutException

SECONDS = 5
"""For reading an answer, and for comparing two: math-verify's own limit, by an alarm that not every hang hears."""
LONGEST = 400
"""Characters of an answer: no reference answer is longer, and the time to read one grows with it."""
BOX = re.compile(r"\\(?:boxed|fbox)\b\s*(?=\{)")
RELATION = re.compile(
    r"[<>=≤≥≠≈|~&]|\\\\|\\(?:[lgn]eq?(?:slant)?|lt|gt|approx|sim|equiv|cong|propto|mid|to|in|implies|iff|lor|land|vee|wedge|"
    r"cup|cap|(?:[Ll]ong)?(?:[Ll]eft|[Rr]ight)(?:right)?arrow)\b"
)
"""What makes a statement or a choice of an answer, of which either side might be taken for it; a line break too."""
NAMED = re.compile(r"\\?[A-Za-z]\w*(?:\([A-Za-z]\))?")
"""What may stand before an equals sign: x, \theta, f(x)."""


def math_verify(completions: Sequence[Any], answer: Sequence[Any], **columns: Any) -> list[float | None]:
    r"""1 where the only `\boxed{...}` of a completion equals the column `answer`, else 0.

    Returns:
        None where the reference answer is missing (None, NaN) or cannot be read: nobody can then judge the response.

    Raises:
        TimeoutException: math-verify's own limit has passed; the caller tries the samples one by one.
    """
    del columns
    return [_judged(_text(completion), right) for completion, right in zip(completions, answer, strict=True)]


def boxed_answer(text: str) -> str | None:
    r"""What the only box of a text holds; None if there is none, more than one, or it does not close.

    Of a text with thoughts what follows the last `</think>` counts: models try answers in a thought, in boxes too. A
    thought that does not close has given none.
    """
    text = text.rpartition("</think>")[2]
    boxes = list(BOX.finditer(text))
    if len(boxes) != 1 or "<think>" in text:
        return None
    start = boxes[0].end()
    depth = 0
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0) if text[place - 1] != "\\" else 0
        if depth == 0:
            return text[start + 1 : place].strip() or None
    return None


def one_answer(text: str) -> bool:
    """Whether an answer is a single one: not two numbers side by side, no relation but `x = ...`."""
    if re.search(r"\d\s+\d", text):
        return False
    left, _, right = text.rpartition("=")
    return not RELATION.search(right) and (not left or NAMED.fullmatch(left.strip()) is not None)


def _judged(text: str, answer: Any) -> float | None:
    if answer is None or (isinstance(answer, float) and math.isnan(answer)):
        return None
    right = boxed_answer(str(answer)) or str(answer).strip().strip("$")
    gold = _parsed(right)
    if not gold:
        return None
    given = boxed_answer(text)
    if given is None or len(given) > LONGEST or (one_answer(right) and not one_answer(given)):
        return 0.0
    try:
        return float(verify(gold, _parsed(given), timeout_seconds=SECONDS, raise_on_error=True))
    except TimeoutException:
        raise
    except Exception:  # no two expressions that can be compared
        return 0.0


def _parsed(answer: str) -> list[Any]:
    """What math-verify makes of an answer; nothing if it cannot read it."""
    try:
        return parse(f"\\boxed{{{answer}}}", parsing_timeout=SECONDS, raise_on_error=True)
    except TimeoutException:
        raise
    except Exception:
        return []


def _text(completion: Any) -> str:
    """A completion as one text: a string, or the policy's own messages."""
    if isinstance(completion, str):
        return completion
    return "\n".join(message["content"] for message in completion if message["role"] == "assistant")
