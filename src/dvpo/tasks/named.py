"""The task that a config names."""

import importlib
from typing import Any

from dvpo.errors import InputError
from dvpo.tasks import Task


def make_task(settings: Any) -> Task:
    """The task that a config's `task` section names: an embedded one, `files`, `mix`, or `my_module:make_task`.

    The last is called with the section.

    Raises:
        InputError: no such task, or one that cannot be imported.
    """
    if settings.name == "math":
        from dvpo.tasks.math import ChainArithmetic

        return ChainArithmetic()
    if settings.name == "science":
        from dvpo.tasks.science import Science

        return Science(ood_kind=settings.ood)
    if settings.name == "dialogue":
        from dvpo.tasks.dialogue import SlotFilling

        return SlotFilling(ood_kind=settings.ood)
    if settings.name == "mix":
        from dvpo.tasks.mixture import Mixture

        tasks, parts = [make_task(part) for part in settings.mix], settings.mix
        return Mixture(tasks, [part.weight for part in parts], [part.label for part in parts])
    if settings.name == "reasoning_gym":
        from dvpo.tasks.gym import ReasoningGym

        return ReasoningGym(settings.generators, settings.ood_generators)
    if settings.name == "files":
        from dvpo.tasks.files import FilesTask

        return FilesTask(
            settings.path,
            id_path=settings.id_path,
            ood_path=settings.ood_path,
            prompt_column=settings.prompt_column,
            held_out=settings.held_out,
            truth=settings.truth,
            answer_pattern=settings.answer_pattern,
        )
    module, colon, attribute = settings.name.partition(":")
    if not colon:
        raise InputError(
            f"task.name = {settings.name} is unknown: take math, science, dialogue, files, reasoning_gym, mix, or "
            "my_module:make_task"
        )
    try:
        task = getattr(importlib.import_module(module), attribute)(settings)
    except InputError:
        raise
    except Exception as error:  # the user's code may raise whatever it likes
        raise InputError(
            f"task.name = {settings.name} cannot be made ({type(error).__name__}: {error}): "
            "mend it, or check PYTHONPATH"
        ) from error
    if not all(callable(getattr(task, method, None)) for method in ("split", "environment", "true_reward")):
        raise InputError(
            f"task.name = {settings.name} made a {type(task).__name__}: return an object with split, environment and "
            "true_reward"
        )
    return task
