"""What a privileged critic reads and the policy does not: a column of the data, in front of the prompt."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dvpo.config import Config
from dvpo.encoding import ChatEncoder
from dvpo.errors import InputError
from dvpo.tasks import Example

NO_TOKEN = -1


class Privilege:
    """Turns a column into the hints of a rollout.

    Args:
        column: its name.
        encoder: tokenises it.
        examples: the training examples.
        room: tokens that prompt and response leave of the model's context.

    Raises:
        InputError: an example without the column, or with more tokens than there is room for.
    """

    def __init__(self, column: str, encoder: ChatEncoder, examples: Sequence[Example], room: int) -> None:
        self.column, self.encoder = column, encoder
        for example in examples:
            if column not in example.columns:
                raise InputError(
                    f"critic.privileged = {column} is no column of example {example.id}: "
                    f"take one of {', '.join(sorted(example.columns)) or 'none, as it has no columns'}"
                )
            length = len(self._tokens(example.columns[column]))
            if length > room:
                raise InputError(
                    f"critic.privileged = {column} has {length} tokens in example {example.id}, but prompt and "
                    f"response leave {room} of the model's context: lower sampling.max_completion_length"
                )

    def hints(self, columns: Mapping[str, Sequence[Any]]) -> Tensor:
        """The column's values as `Rollout.hints_BH`; one that is None gives no token."""
        rows = [self._tokens(value) for value in columns[self.column]]
        width = max(map(len, rows))
        return torch.tensor([[NO_TOKEN] * (width - len(row)) + row for row in rows], dtype=torch.long)

    def _tokens(self, value: Any) -> list[int]:
        return [] if value is None else self.encoder.plain(f"{value}\n")


def open_privilege(
    config: Config,
    encoder: ChatEncoder,
    examples: Sequence[Example],
    prompt_tokens: Mapping[str, Sequence[int]],
    room: int,
) -> Privilege | None:
    """What the critic of a run alone reads; None where it reads what the policy reads.

    Args:
        config: names the column.
        encoder: tokenises it.
        examples: the training examples.
        prompt_tokens: of each.
        room: tokens that a response leaves of the model's context.
    """
    if config.critic.privileged is None:
        return None
    return Privilege(config.critic.privileged, encoder, examples, room - max(map(len, prompt_tokens.values())))
