"""Reductions: the identity alone, and over two processes what one process gets from the whole batch."""

import json
import os
import subprocess

import pytest
import torch

from dvpo import distributed
from dvpo.core.masks import masked_mean, whiten
from processes import SPEAKING, TORCHRUN

VALUES_BT = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)) * 3 + 100
MASK_BT = torch.rand(6, 5, generator=torch.Generator().manual_seed(1)) < 0.6
SPLIT = 4
"""Rank 0 gets 4 sequences and rank 1 gets 2: equal shares would hide a mean of means."""

PROGRAM = """
import json, sys, warnings
from pathlib import Path
import torch
from dvpo import distributed
from dvpo.core.masks import masked_mean, whiten
from dvpo.errors import InputError
from dvpo.parallel import gathered
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

device = distributed.init_from_env("cpu")
rank = distributed.rank()
given = json.loads(sys.argv[1])
mine = slice(0, given["split"]) if rank == 0 else slice(given["split"], None)
values, mask = torch.tensor(given["values"])[mine], torch.tensor(given["mask"])[mine]

count = torch.tensor(float(2**24 + rank), dtype=torch.float64)
view = torch.arange(4.0).reshape(2, 2).T + rank
answer = {
    "world_size": distributed.world_size(),
    "is_main": distributed.is_main(),
    "device": str(device),
    "mean": masked_mean(values, mask, distributed.all_reduce_sum).item(),
    "whitened": whiten(values, mask, distributed.all_reduce_sum).tolist(),
    "whitened_locally": whiten(values, mask).tolist(),
    "count": distributed.all_reduce_sum(count).item(),
    "own_count": count.item(),
    "view": distributed.all_reduce_sum(view).tolist(),
    "max": distributed.all_reduce_max(torch.tensor([rank, -rank])).tolist(),
    "objects": distributed.gather_objects({"rank": rank, "text": "x" * (rank + 1)}),
}
try:
    distributed.all_reduce_sum(torch.ones(1, requires_grad=True))
except ValueError:
    answer["refuses_gradient"] = True
def refuse(who):
    if rank in who:
        raise InputError(f"refused to {rank}")
    return rank
answer["together"] = [distributed.together(lambda: refuse(()))]
for who in ((1,), (0, 1)):
    try:
        distributed.together(lambda: refuse(who))
    except InputError as error:
        answer["together"].append(str(error))
mesh = init_device_mesh("cpu", (2,))
wholes = [torch.arange(12.0).reshape(4, 3), torch.arange(6.0).reshape(3, 2), torch.tensor([7.0])]
shares = [distribute_tensor(whole, mesh, [Shard(0)]) for whole in wholes]
answer["rows"] = [len(share.to_local()) for share in shares]
with CommDebugMode() as operations:
    answer["gathered"] = [torch.equal(gathered(share), whole) for share, whole in zip(shares, wholes)]
answer["functional"] = [str(name) for name in operations.get_comm_counts() if "c10d_functional" in str(name)]
distributed.barrier()
distributed.shutdown()
answer["world_size_after"] = distributed.world_size()
Path(sys.argv[2], f"{rank}.json").write_text(json.dumps(answer))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> list[dict]:
    """What each of two gloo processes, started by torchrun, got from its share of the batch."""
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "program.py").write_text(PROGRAM)
    given = json.dumps({"values": VALUES_BT.tolist(), "mask": MASK_BT.tolist(), "split": SPLIT})
    subprocess.run(
        [*TORCHRUN, "--nproc-per-node=2", str(folder / "program.py"), given, str(folder)],
        check=True,
        timeout=270,
        env={**os.environ, **SPEAKING},
    )
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_there_are_two_processes_and_one_is_main(answers: list[dict]) -> None:
    assert [answer["world_size"] for answer in answers] == [2, 2]
    assert [answer["is_main"] for answer in answers] == [True, False]
    assert [answer["device"] for answer in answers] == ["cpu", "cpu"]
    assert [answer["world_size_after"] for answer in answers] == [1, 1]


def test_a_masked_mean_over_two_processes_is_that_of_the_whole_batch(answers: list[dict]) -> None:
    whole = masked_mean(VALUES_BT, MASK_BT).item()
    assert [answer["mean"] for answer in answers] == pytest.approx([whole, whole], rel=1e-6)
    assert answers[0]["mean"] == answers[1]["mean"], "both processes must hold the same bits"


def test_whitening_over_two_processes_is_that_of_the_whole_batch(answers: list[dict]) -> None:
    joined = torch.tensor(answers[0]["whitened"] + answers[1]["whitened"])
    assert torch.allclose(joined, whiten(VALUES_BT, MASK_BT), atol=1e-5)


def test_whitening_each_share_by_itself_would_fail_the_test_above(answers: list[dict]) -> None:
    joined = torch.tensor(answers[0]["whitened_locally"] + answers[1]["whitened_locally"])
    assert not torch.allclose(joined, whiten(VALUES_BT, MASK_BT), atol=0.05)


def test_a_sum_keeps_float64_and_leaves_its_argument_alone(answers: list[dict]) -> None:
    # 2^24 + (2^24 + 1) = 33554433 needs 25 bits: float32 would say 33554432.
    assert [answer["count"] for answer in answers] == [33554433.0, 33554433.0]
    assert [answer["own_count"] for answer in answers] == [2.0**24, 2.0**24 + 1]


def test_a_transposed_tensor_is_summed_in_its_own_order(answers: list[dict]) -> None:
    # [[0, 2], [1, 3]] + [[1, 3], [2, 4]]
    assert [answer["view"] for answer in answers] == [[[1.0, 5.0], [3.0, 7.0]]] * 2


def test_the_maximum_is_element_wise(answers: list[dict]) -> None:
    assert [answer["max"] for answer in answers] == [[1, 0], [1, 0]]


def test_objects_come_in_the_order_of_ranks_on_every_process(answers: list[dict]) -> None:
    assert [answer["objects"] for answer in answers] == [[{"rank": 0, "text": "x"}, {"rank": 1, "text": "xx"}]] * 2


def test_what_one_process_is_refused_both_are_told(answers: list[dict]) -> None:
    for rank, answer in enumerate(answers):
        assert answer["together"] == [rank, "refused to 1", "refused to 0"]


def test_a_gradient_is_refused_by_two_processes_and_by_one(answers: list[dict]) -> None:
    assert [answer["refuses_gradient"] for answer in answers] == [True, True]
    with pytest.raises(ValueError, match="carries no gradient"):
        distributed.all_reduce_sum(torch.ones(1, requires_grad=True))


def test_shares_of_rows_are_gathered_whole_and_not_by_the_operation_that_damages_the_heap(answers: list[dict]) -> None:
    assert [answer["rows"] for answer in answers] == [[2, 2, 1], [2, 1, 0]]
    assert [answer["gathered"] for answer in answers] == [[True] * 3] * 2
    assert [answer["functional"] for answer in answers] == [[], []]


def test_alone_everything_is_the_identity(monkeypatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert distributed.init_from_env("cpu") == torch.device("cpu")
    chosen: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert [distributed.init_from_env(name) for name in ("cuda", "cuda:1")] == [
        torch.device("cuda"),
        torch.device("cuda:1"),
    ]
    assert chosen == ["cuda:1"]  # what is launched on the current GPU is launched there
    assert (distributed.world_size(), distributed.rank(), distributed.is_main()) == (1, 0, True)
    tensor, value = torch.tensor([1.0, 2.0]), object()
    assert distributed.all_reduce_sum(tensor) is tensor
    assert distributed.all_reduce_max(tensor) is tensor
    assert distributed.gather_objects(value) == [value]
    assert distributed.together(lambda: value) is value
    distributed.barrier()
    distributed.shutdown()
