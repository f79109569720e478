"""`dvpo demo`: a tiny language model trained by several algorithms under one noisy reward, side by side."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from rich.table import Table

from dvpo.evaluate import interval_text
from dvpo.loading import load_config
from dvpo.plain_text import plain_console
from dvpo.progress import RunProgress
from dvpo.report import write_report
from dvpo.trainer import Trainer
from dvpo.warmstart import starting_model


def run_demo(
    algorithms: Sequence[str], steps: int, rate: float, seed: int, output: str | None, overrides: Sequence[str]
) -> None:
    """Train each algorithm on the same prompts, seeds and noise; print true accuracy before and after, write a report.

    Args:
        algorithms: rows of the algorithm table.
        steps: training steps of each.
        rate: share of observed rewards that are flipped.
        seed: the run's seed, the same for all.
        output: folder for the runs; None makes a new one under `runs/`.
        overrides: further `key=value` settings.

    Raises:
        InputError: bad settings, before anything is trained.
    """
    console = plain_console()
    folder = Path(output or f"runs/demo-{datetime.now():%Y%m%d-%H%M%S}")
    configs = {
        name: load_config(
            None,
            [f"algorithm={name}", f"output={folder / name}", f"seed={seed}", f"steps={steps}", "noise.kind=flip",
             f"noise.rate={rate}", "evaluation.prompts=256", f"evaluation.every={max(steps // 5, 1)}", *overrides],
        )
        for name in algorithms
    }  # fmt: skip
    first = next(iter(configs.values()))
    noise = flipped = f"noise of kind {first.noise.kind}"
    if first.noise.kind == "flip" and not first.noise.then:
        share = f"{100 * (first.noise.rate or 0):g}%"
        noise, flipped = f"{share} of them are flipped", f"{share} flipped rewards"
    console.print(
        f"A tiny Qwen3 learns {first.task.name} by {' and '.join(configs)} for {first.steps} steps each.\n"
        f"Observed rewards: {noise}. Starting model: {starting_model(first)}",
        soft_wrap=True,
    )
    results = {}
    for name, config in configs.items():
        with RunProgress(name, config.steps, Path(config.output), console=console) as progress:
            trainer = Trainer(config, observer=progress)
            evaluations = trainer.train()
            results[name] = (evaluations[0], evaluations[config.steps], trainer.folder)
    title = f"True accuracy (%), {flipped}, seed {first.seed}, checker dial {first.model.checker:g}"
    console.print(_table(results, title))
    for name, (_, _, run) in results.items():
        console.print(f"{name}: {run}", soft_wrap=True)
    page = write_report([str(run) for _, _, run in results.values()])
    console.print(f"report: {page}", soft_wrap=True)
    console.print("One seed proves nothing: differences between algorithms this small are within seed noise.")


def _table(results: dict[str, tuple[dict[str, float], dict[str, float], Path]], title: str) -> Table:
    table = Table(title=title, caption="in brackets: 95% Wilson interval over the held-out prompts")
    for column in ("algorithm", "ID before", "ID after", "OOD before", "OOD after"):
        table.add_column(column, justify="left" if column == "algorithm" else "right")
    for name, (before, after, _) in results.items():
        table.add_row(
            name, *(interval_text(f, f"eval/{split}/accuracy") for split in ("id", "ood") for f in (before, after))
        )
    return table
