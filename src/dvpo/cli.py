"""The command line: `dvpo demo`, `train`, `eval`, `study`, `report`, `inspect`, `watch`, `label`, `reward-model`,
`diagnose`, `doctor`.

Exit codes: 0 done, 1 a fault of ours (with its traceback) or a failed run of a study, 2 bad input (one sentence),
3 a run that stopped itself (one sentence), 75 interrupted by SIGTERM or SIGINT, and the same command (`train` with
`--resume`) goes on; 143 and 130 the same, but there is nothing to go on with.
"""

import argparse
import os
import sys
import time
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from dvpo.errors import InputError, RunStoppedError, warning_text
from dvpo.interrupt import Interrupted, handled

FIRST_SPEAKS_SECONDS = 15.0
OVERRIDES = "settings that win over the file, for example critic.alpha=0.05"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = parse(argv)
    # Reward functions, tasks and rows of the user's own are imported from where the command was given.
    sys.path.insert(0, os.getcwd())
    warnings.formatwarning = warning_text
    try:
        with handled():
            code: int | None = arguments.run(arguments)
    except InputError as error:
        _refuse(str(error))
        return 2
    except RunStoppedError as error:
        _say(f"the run stopped itself: {error}")
        return 3
    except Interrupted as stop:
        _say(f"interrupted by {stop}; {arguments.go_on}")
        return stop.exit_code
    return code or 0


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of a command line; one that makes no sense ends the process with exit code 2."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if "run" not in arguments:
        parser.print_help(sys.stderr)
        parser.exit(2)
    # argparse takes no further positionals behind an option: `train a.yaml --resume steps=200` leaves steps=200 over.
    unknown = [word for word in rest if word.startswith("-") or "=" not in word or "overrides" not in arguments]
    if unknown:
        remedy = _as_override(unknown[0], rest) if "overrides" in arguments else None
        parser.error(f"unrecognised argument {unknown[0]}: {remedy or 'see dvpo COMMAND --help'}")
    if rest:
        arguments.overrides += rest
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and arguments.run is not _train:
        parser.error("only `dvpo train` takes several processes: start this command without torchrun")
    return arguments


def _as_override(word: str, words: Sequence[str]) -> str | None:
    """How to write an option that is a setting: `--steps 3` is `steps=3`."""
    from dvpo.config import Config
    from dvpo.nested import all_keys

    name, _, value = word.lstrip("-").partition("=")
    if name not in all_keys(Config):
        return None
    behind = [*words[words.index(word) + 1 :], "-"][0]
    return f"write {name}={value or ('VALUE' if behind.startswith('-') else behind)}"


def _say(sentence: str) -> None:
    """Of several processes the first speaks: they read the same config, and what ends a run they agree on."""
    if os.environ.get("RANK", "0") == "0":
        print(f"dvpo: {sentence}", file=sys.stderr)  # noqa: T201


def _refuse(sentence: str) -> None:
    """Of several processes that read the same config the first says what is wrong with it.

    Torchrun ends all as soon as one has ended, so the others wait for that. One that still lives then was the only one
    to be refused, and speaks.
    """
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        _say(sentence)
    else:
        time.sleep(FIRST_SPEAKS_SECONDS)
        print(f"dvpo: process {rank}: {sentence}", file=sys.stderr)  # noqa: T201


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dvpo",
        description="Train language models by reinforcement learning when rewards are noisy.",
        epilog="Begin with `dvpo demo`. With a config of your own: `dvpo doctor`, `dvpo diagnose`, `dvpo train`, then "
        "`dvpo eval` and `dvpo report`. `dvpo COMMAND --help` has the options, docs/tutorial.md walks through them.",
    )
    parser.set_defaults(go_on="nothing was written")
    parser.add_argument("--version", action="version", version=f"dvpo {version('dvpo')}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    def command(name: str, what: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")

    def overrides(of: argparse.ArgumentParser, what: str = OVERRIDES) -> None:
        # Without a default argparse calls them required.
        of.add_argument("overrides", nargs="*", default=[], metavar="key.sub=value", help=what)

    demo = command("demo", "train a tiny model by dvpo and ppo under a noisy reward (minutes, CPU)")
    demo.add_argument("--algorithms", nargs="+", default=["dvpo", "ppo"], metavar="NAME", help="default: dvpo ppo")
    demo.add_argument("--steps", type=int, metavar="N", default=100, help="training steps of each (default: 100)")
    demo.add_argument("--noise", type=float, metavar="X", default=0.2, help="share of flipped rewards (default: 0.2)")
    demo.add_argument("--seed", type=int, metavar="N", default=0, help="of prompts, draws and noise (default: 0)")
    demo.add_argument("--output", help="folder of the runs (default: a new one under runs/)")
    demo.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help=OVERRIDES)
    demo.set_defaults(run=_demo, go_on="the run folders hold what was done")

    train = command("train", "train as a YAML config says")
    train.add_argument("config", metavar="CONFIG.yaml", help="settings of the run; configs/ has some to start from")
    overrides(train)
    train.add_argument("--resume", action="store_true", help="go on from the newest sound checkpoint in `output`")
    train.add_argument(
        "--allow", metavar="KEY,KEY", help="settings or sections in which a resumed run may differ from before"
    )
    train.add_argument("--print-config", action="store_true", help="print the whole config as YAML and stop")
    train.set_defaults(run=_train, go_on="`dvpo train ... --resume` goes on from the last checkpoint")

    settings = command("settings", "what the settings mean, what they may be, and their defaults")
    settings.add_argument("words", nargs="*", metavar="WORD", help="of a name, such as advantage or lam; none: all")
    settings.add_argument("--algorithm", default="dvpo", metavar="NAME", help="whose defaults (default: dvpo)")
    settings.set_defaults(run=_settings)

    evaluate = command("eval", "evaluate a checkpoint on its task, one JSONL row an item")
    evaluate.add_argument("checkpoint", metavar="RUN_OR_CHECKPOINT", help="a run folder (newest checkpoint) or one")
    overrides(evaluate)
    evaluate.add_argument("--splits", nargs="+", help="default: id and ood, if the task has them")
    evaluate.add_argument(
        "--samples",
        type=int,
        metavar="N",
        help="draws an item for pass@k; 0: greedy (default: evaluation.samples, or 8 where that is 0)",
    )
    evaluate.add_argument("--output", help="the rows (default: a new evaluation-N.jsonl in the run folder)")
    evaluate.set_defaults(run=_eval)

    study = command("study", "a grid of task x noise x algorithm x seed; the same command resumes it")
    study.add_argument("study", metavar="STUDY.yaml", help="the grid; configs/studies/ has some to start from")
    overrides(study, f"{OVERRIDES}; of every run")
    study.add_argument(
        "--processes", type=int, metavar="N", help="runs at a time (default: cores; 1 where runs take a GPU)"
    )
    study.add_argument("--only", metavar="AXIS=VALUE,...", help="some cells, e.g. task=math,noise=flip,seed=101")
    study.add_argument("--results", metavar="FILE", help="default: results.jsonl in the study's output")
    study.add_argument("--table", action="store_true", help="run nothing, print tables of the results")
    study.add_argument("--markdown", action="store_true", help="the same as Markdown")
    study.add_argument(
        "--last-quarter", action="store_true", help="tables of the mean over the last quarter's evaluations"
    )
    study.add_argument("--baseline", help="whom the tables compare with (default: ppo, else the first)")
    study.set_defaults(run=_study, go_on="the same command goes on with the study")

    report = command("report", "one HTML page of runs side by side, or of a study")
    report.add_argument(
        "sources", nargs="+", metavar="RUN_OR_STUDY", help="run folders, folders of runs, or STUDY.yaml"
    )
    report.add_argument("--output", metavar="FILE.html", help="default: report.html where the runs are")
    report.add_argument("--results", metavar="FILE", help="of a study: default results.jsonl in the study's output")
    report.add_argument("--baseline", help="whom the others are compared with (default: ppo, else the first)")
    report.set_defaults(run=_report)

    inspect = command("inspect", "a response token by token, as a checkpoint's critic sees it")
    inspect.add_argument("checkpoint", metavar="RUN_OR_CHECKPOINT", help="a run folder (newest checkpoint) or one")
    inspect.add_argument("--prompt", help="a prompt of your own; default: an example of the task")
    inspect.add_argument("--split", default="id", help="of the example: train, id or ood (default: id)")
    inspect.add_argument("--row", type=int, metavar="N", default=0, help="its place in the split, from 0 (default: 0)")
    inspect.add_argument("--response", help="look at this text instead of a sampled one")
    inspect.add_argument("--reward", type=float, metavar="X", help="of the response, where the task does not know it")
    inspect.add_argument("--greedy", action="store_true", help="take the likeliest tokens instead of drawing")
    inspect.add_argument("--seed", type=int, metavar="N", default=0, help="of the draw (default: 0)")
    inspect.add_argument("--colour", choices=["advantage", "value", "width"], default="advantage", help="of the tokens")
    inspect.add_argument("--compare", metavar="RUN_OR_CHECKPOINT", help="the same response under another critic")
    inspect.add_argument("--html", metavar="FILE.html", help="write the view as a page as well")
    inspect.set_defaults(run=_inspect)

    watch = command("watch", "curves of runs in the terminal, redrawn while they go on")
    watch.add_argument("runs", nargs="+", metavar="RUN", help="run folders or folders of runs, begun or not")
    watch.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="KEY",
        help="draw this figure instead of the usual ones; KEY,KEY in one chart, 'critic/*' a chart each; repeatable",
    )
    watch.add_argument("--once", action="store_true", help="draw once and end; so does an output that is no terminal")
    watch.add_argument("--every", type=float, default=2.0, metavar="SECONDS", help="default: 2")
    watch.set_defaults(run=_watch)

    label = command("label", "majority-vote pseudo-labels of the training prompts, by any model")
    label.add_argument("config", metavar="CONFIG.yaml", help="of a run; nothing is trained")
    overrides(label)
    label.add_argument("--samples", type=int, metavar="N", default=8, help="answers a prompt (default: 8)")
    label.add_argument("--prompts", type=int, metavar="N", help="only so many of the first prompts (default: all)")
    label.add_argument("--output", default="labels.jsonl", metavar="FILE.jsonl", help="default: labels.jsonl")
    label.set_defaults(run=_label)

    reward = command("reward-model", "train a reward model on preference pairs, or make such pairs")
    reward.add_argument("pairs", metavar="PAIRS.jsonl", help='lines of {"prompt": ..., "chosen": ..., "rejected": ...}')
    reward.add_argument("--model", default="embedded", help="a folder or hub name to start from (default: embedded)")
    reward.add_argument("--output", default="reward-model", metavar="FOLDER", help="default: reward-model")
    reward.add_argument("--epochs", type=int, metavar="N", default=2, help="default: 2")
    reward.add_argument(
        "--lr", type=float, metavar="X", default=1e-3, help="default: 1e-3; about 1e-5 for a large model"
    )
    reward.add_argument(
        "--batch-size", type=int, metavar="N", default=32, help="pairs in an optimiser step (default: 32)"
    )
    reward.add_argument(
        "--held-out", type=float, metavar="X", default=0.1, help="share of prompts to test on (default: 0.1)"
    )
    reward.add_argument(
        "--seed", type=int, metavar="N", default=0, help="of the order and of the new head (default: 0)"
    )
    reward.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1 ...")
    reward.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="compute type")
    made = reward.add_argument_group("making PAIRS.jsonl instead of reading it")
    made.add_argument("--from-task", metavar="CONFIG.yaml", help="answers of its model, ordered by its task's verifier")
    made.add_argument(
        "--pairs", dest="count", type=int, metavar="N", default=2000, help="pairs to make (default: 2000)"
    )
    made.add_argument("--wrong", type=float, metavar="X", default=0.0, help="share of them to be turned (default: 0)")
    made.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help=OVERRIDES)
    reward.set_defaults(run=_reward_model)

    diagnose = command("diagnose", "how noisy a reward is on a model's answers, and what follows")
    diagnose.add_argument("config", metavar="CONFIG.yaml", help="of a run; nothing is trained")
    overrides(diagnose)
    diagnose.add_argument("--prompts", type=int, metavar="N", default=64, help="training prompts to try (default: 64)")
    diagnose.add_argument("--samples", type=int, metavar="N", default=8, help="answers a prompt (default: 8)")
    diagnose.add_argument("--repeats", type=int, metavar="N", default=2, help="scorings of each answer (default: 2)")
    diagnose.add_argument(
        "--reward", action="append", default=[], metavar="FUNCTION", help="a further reward to compare with; repeatable"
    )
    diagnose.add_argument("--json", metavar="FILE.json", help="write findings, advice and settings as well")
    diagnose.set_defaults(run=_diagnose)

    doctor = command("doctor", "what is installed; what a config will need in memory and time")
    doctor.add_argument(
        "config", nargs="?", metavar="CONFIG.yaml", help="of a run to be measured; none: what is installed"
    )
    doctor.add_argument(
        "--gpus",
        type=int,
        metavar="N",
        help="only predict the memory of each of N GPUs; no GPU and no weights are needed, the model's config.json is",
    )
    overrides(doctor)
    doctor.set_defaults(run=_doctor)
    return parser


# Imports stand inside the commands: `dvpo --help` and a wrong config need no seconds of torch.


def _demo(arguments: argparse.Namespace) -> None:
    from dvpo.demo import run_demo

    run_demo(arguments.algorithms, arguments.steps, arguments.noise, arguments.seed, arguments.output, arguments.set)


def _train(arguments: argparse.Namespace) -> None:
    from dvpo.config import to_yaml
    from dvpo.loading import load_config

    config = load_config(arguments.config, arguments.overrides)
    if arguments.print_config:
        sys.stdout.write(to_yaml(config))
        return
    if arguments.allow and not arguments.resume:
        raise InputError("--allow names what a resumed run may change: add --resume")
    first = os.environ.get("RANK", "0") == "0"
    if not first:
        warnings.simplefilter("ignore")  # the first process gives them
    try:
        from dvpo.distributed import shutdown
        from dvpo.plain_text import plain_console
        from dvpo.progress import RunProgress
        from dvpo.trainer import Trainer

        allow = arguments.allow.split(",") if arguments.allow else ()
        trainer = Trainer(config, resume=arguments.resume, allow=allow)
        console = plain_console(quiet=not first)
        if arguments.resume:
            console.print(_resumed(trainer.folder, trainer.step, config.steps), soft_wrap=True)
        with RunProgress(config.algorithm, config.steps, trainer.folder, trainer.step, console) as progress:
            trainer.observer = progress
            trainer.train()
            progress.console.print(f"run folder: {trainer.folder}", soft_wrap=True)
        shutdown()
    except Interrupted as stop:
        stop.resumable = os.path.exists(os.path.join(config.output, "config.yaml"))  # what a resume needs
        if not stop.resumable:
            arguments.go_on = "nothing was written"
        raise


def _resumed(folder: Path, step: int, steps: int) -> str:
    if step == steps:
        return f"{folder} is at its last step, {steps}: raise steps to train on"
    return f"resumed from {folder}/checkpoint-{step}" if step else f"{folder} begins again: no step of it was saved"


def _settings(arguments: argparse.Namespace) -> None:
    from dvpo.explain import settings_text
    from dvpo.loading import load_config

    config = load_config(None, [f"algorithm={arguments.algorithm}"])
    sys.stdout.write(settings_text(config, arguments.words))


def _eval(arguments: argparse.Namespace) -> None:
    from dvpo.evaluate import evaluate_checkpoint

    evaluate_checkpoint(
        arguments.checkpoint, arguments.overrides, arguments.splits, arguments.samples, arguments.output
    )


def _study(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from dvpo.plain_text import plain_console, table_console
    from dvpo.study import load_study

    study = load_study(arguments.study, arguments.overrides, arguments.only)
    results = Path(arguments.results) if arguments.results else study.results
    tables = arguments.table or arguments.markdown
    if not tables and (arguments.last_quarter or arguments.baseline):
        option = "--last-quarter" if arguments.last_quarter else f"--baseline = {arguments.baseline}"
        raise InputError(f"{option} says how tables are made: add --table or --markdown, or drop it to run the study")
    if tables:
        from dvpo.study_results import last_quarter, read_results
        from dvpo.study_table import make_report, print_report, to_markdown

        rows = read_results(results)
        rows = [last_quarter(row) for row in rows] if arguments.last_quarter else rows
        report = make_report(study, rows, arguments.baseline, arguments.last_quarter)
        if arguments.markdown:
            sys.stdout.write(to_markdown(report))
        else:
            print_report(report, table_console())
        return 0
    from dvpo.study_run import run_study

    console = plain_console()
    try:
        failed = run_study(study, arguments.processes, results, console)
    except Interrupted as stop:
        stop.resumable = True
        raise
    if failed:
        console.print(f"{len(failed)} runs failed: the same command tries them again", soft_wrap=True)
    return 1 if failed else 0


def _report(arguments: argparse.Namespace) -> None:
    from dvpo.plain_text import plain_console
    from dvpo.report import write_report

    page = write_report(arguments.sources, arguments.output, arguments.results, arguments.baseline)
    plain_console().print(f"report: {page}", soft_wrap=True)


def _inspect(arguments: argparse.Namespace) -> None:
    from dvpo.inspection import Question, inspect_checkpoint
    from dvpo.plain_text import plain_console

    question = Question(
        prompt=arguments.prompt,
        split=arguments.split,
        row=arguments.row,
        response=arguments.response,
        reward=arguments.reward,
        greedy=arguments.greedy,
        seed=arguments.seed,
    )
    colour = {"advantage": "advantages"}.get(arguments.colour, arguments.colour)
    inspect_checkpoint(arguments.checkpoint, question, colour, arguments.compare, arguments.html, plain_console())


def _watch(arguments: argparse.Namespace) -> None:
    from dvpo.plain_text import plain_console
    from dvpo.watch import watch

    watch(arguments.runs, arguments.metric, arguments.once, arguments.every, plain_console())


def _label(arguments: argparse.Namespace) -> None:
    from dvpo.label import label_file
    from dvpo.loading import load_config
    from dvpo.plain_text import plain_console

    config = load_config(arguments.config, arguments.overrides)
    label_file(config, arguments.samples, arguments.prompts, arguments.output, plain_console())


def _reward_model(arguments: argparse.Namespace) -> None:
    from dvpo.plain_text import plain_console

    if arguments.from_task:
        from dvpo.loading import load_config
        from dvpo.preferences import pairs_file

        config = load_config(arguments.from_task, arguments.set)
        pairs_file(config, arguments.count, arguments.wrong, arguments.pairs, plain_console())
        return
    from dvpo.reward_training import Training, train_folder

    settings = Training(
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        lr=arguments.lr,
        held_out=arguments.held_out,
        seed=arguments.seed,
    )
    output, device, dtype = arguments.output, arguments.device, arguments.dtype
    train_folder(arguments.pairs, arguments.model, output, settings, device, dtype, plain_console())


def _diagnose(arguments: argparse.Namespace) -> None:
    from dvpo.diagnose import Effort, diagnose_file
    from dvpo.loading import load_config
    from dvpo.plain_text import plain_console

    config = load_config(arguments.config, arguments.overrides)
    effort = Effort(prompts=arguments.prompts, samples=arguments.samples, repeats=arguments.repeats)
    diagnose_file(config, effort, arguments.reward, arguments.json, plain_console())


def _doctor(arguments: argparse.Namespace) -> None:
    from dvpo.doctor import report_installation, report_needs
    from dvpo.loading import load_config
    from dvpo.plain_text import plain_console

    console = plain_console()
    config = load_config(arguments.config, arguments.overrides) if arguments.config else None
    if arguments.gpus is not None:
        if config is None:
            raise InputError(f"--gpus {arguments.gpus} needs a config: dvpo doctor CONFIG.yaml --gpus {arguments.gpus}")
        from dvpo.plan import report_plan

        report_plan(config, arguments.gpus, console)
        return
    report_installation(console)
    if config is not None:
        report_needs(config, console)
