"""Completions that try to be something other than text, and run folders that hold them."""

import json
from pathlib import Path

from dvpo import load_config
from dvpo.config import to_yaml

HOSTILE = {
    "script": "<script>window.attacked = true</script>",
    "image": '<img src="http://example.com/x.png" onerror="window.attacked = true">',
    "closing": '</script><script>window.attacked = true</script><!-- "',
    "style": "</style><style>* { display: none !important }",
    "broken": '<div class="x" <b>unclosed & half &lt; <a href="javascript:window.attacked = true">',
    "template": "{{ 7 * 7 }} {% raw %} ${window.attacked = true} `",
    "right_to_left": "\u202eevil\u202c \u2067x\u2069 \u0634\u0643\u0631\u0627 \u05e9\u05dc\u05d5\u05dd",
    "emoji": "👩‍👩‍👧‍👦 🇬🇧 ✌🏽 é",
    "control": "\x1b[31mred\x1b[0m\x00\x07\x7f\x85 \u2028 \ufeff",
    "surrogate": "half \ud83d of a pair, \udc00 the other",
    "long": "x" * 100_000,
    "empty": "",
}


def write_run(folder: Path, algorithm: str = "dvpo", texts: dict[str, str] = HOSTILE, seed: int = 0) -> Path:
    """A run folder as a run leaves it, whose prompts, completions, tokens and faults are the given texts."""
    folder.mkdir(parents=True)
    config = load_config(None, [f"algorithm={algorithm}", f"seed={seed}", f"output={folder}", "steps=4"])
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "manifest.json").write_text(json.dumps({"commit": "abc", "seed": seed, "resumes": [], "dirty": False}))
    quantiles = algorithm == "dvpo"
    _write(folder / "metrics.jsonl", _metrics(seed))
    _write(folder / "completions.jsonl", [_completion(*item) for item in enumerate(texts.items())])
    _write(folder / "tokens.jsonl", [_tokens(*item, quantiles) for item in enumerate(texts.items())])
    faults = [{"step": 1, "kind": f"kind {name}", "message": text} for name, text in texts.items()]
    _write(folder / "faults.jsonl", faults)
    return folder


def _metrics(seed: int) -> list[dict[str, float]]:
    steps = [
        {
            "step": step,
            "reward/true": 0.1 * step,
            "reward/observed": 0.09 * step,
            "reward/accuracy": 0.8,
            "reward/faults": 0.0,
            "reward/missing": 0.0,
            "critic/explained_variance": 0.1 * step,
            "critic/true_correlation": 0.2 * step,
            "actor/entropy": 1.0 / step,
            "time/step": 1.0,
        }
        for step in range(1, 5)
    ]
    evaluations = [
        {
            "step": step,
            "eval/id/accuracy": 0.4 + 0.1 * step + 0.01 * seed,
            "eval/id/accuracy_low": 0.3 + 0.1 * step,
            "eval/id/accuracy_high": 0.5 + 0.1 * step,
        }
        for step in (0, 2, 4)
    ]
    return sorted([*steps, *evaluations], key=lambda row: row["step"])


def _completion(index: int, item: tuple[str, str]) -> dict[str, object]:
    name, text = item
    return {"step": 1 + index % 4, "prompt_id": name, "visit": 0, "sample": 0, "prompt": f"prompt {name}: {text[:99]}",
            "completion": text, "observed": float(index % 2), "true": float(index % 3 == 0)}  # fmt: skip


def _tokens(index: int, item: tuple[str, str], quantiles: bool) -> dict[str, object]:
    row = _completion(index, item)
    text = str(row.pop("completion"))
    tokens = [text[:3], text[3:6], text[6:], "<|end|>"]
    columns = {
        "tokens": tokens,
        "turns": [0, 0, -1, 1],
        "advantages": [-1.0, 0.5, None, 1.0],
        "value": [0.2, 0.4, None, 0.8],
        "quantiles": [[[0.2]], [[0.4]], None, [[0.8]]],
        "levels": [0.5],
        "alpha": 0.25,
        "beta": 0.25,
    }
    if quantiles:
        law = [[0.0, 0.1, 0.3, 0.4], [0.1, 0.2, 0.4, 0.5]]
        columns |= {"width": [0.3, 0.2, None, 0.1], "lower": [0.0, 0.1, None, 0.2], "upper": [0.5, 0.6, None, 0.9],
                    "quantiles": [law, law, None, law], "levels": [0.125, 0.375, 0.625, 0.875]}  # fmt: skip
    return row | columns


def _write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
