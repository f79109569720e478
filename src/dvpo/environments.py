"""A task's environment as the user wrote it: what goes wrong in a step costs the episode its reward, all else ends the
run in one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager

from dvpo.errors import InputError
from dvpo.reward_worker import one_line
from dvpo.tasks import Environment, Example, Step


class EnvironmentFaultError(InputError):
    """The user's environment raised something; `said` is what, in one line."""

    def __init__(self, said: str) -> None:
        super().__init__(f"task: {said}: mend it")
        self.said = said


@contextmanager
def environment_at(example: Example) -> Iterator[None]:
    """Whatever the user's environment raises at an example, in one sentence."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise EnvironmentFaultError(f"the environment of prompt {example.id} raised {one_line(error)}") from error


def step(environment: Environment, example: Example, response: str) -> Step:
    """The environment's answer.

    Raises:
        EnvironmentFaultError: it raised something, which may pass.
        InputError: it answered no `Step`, which will not.
    """
    with environment_at(example):
        answer = environment.step(response)
    try:
        reward = None if answer.reward is None else float(answer.reward)
        return Step(() if answer.done else tuple(answer.messages), reward, answer.done)
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(
            f"task: the environment of prompt {example.id} answered {answer!r:.80}: let its method step return a "
            "dvpo.tasks.Step of messages, a number or None, and whether it is over"
        ) from error
