"""verl's own PPO loop in the mode dvpo: two workers with actor and critic, a scripted rollout, real TransferQueue."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pandas
import pytest
import ray
import torch
import transfer_queue
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from verl.trainer.ppo.v1 import get_trainer_cls, trainer_base
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from dvpo.critic import load_critic
from dvpo.errors import InputError
from dvpo.integrations.verl.prepare import packaged_settings, prepare
from runs import model_folder

PROMPTS, SAMPLES = 4, 2


class NoServers:
    """In the place of verl's servers of language models: the rollout is written down."""

    @classmethod
    def create(cls, **parts: Any) -> "NoServers":
        return cls()

    def get_replicas(self) -> list[Any]:
        return []


class Recorder:
    """In the place of verl's loggers."""

    rows: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, **settings: Any) -> None:
        Recorder.rows = []

    def log(self, data: dict[str, Any], step: int) -> None:
        Recorder.rows.append({"step": step, **data})


class Script:
    """Writes responses of 1 to 9 random tokens into the queue; right is one whose first token is even."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def _draw(self, most: int) -> torch.Tensor:
        length = int(torch.randint(1, most, (), generator=self.generator))
        return torch.randint(8, 200, (length,), generator=self.generator)

    def generate_sequences(self, batch: Any) -> None:
        step = batch["global_steps"]
        for uid in batch["uid"]:
            keys, fields, tags = [], [], []
            for sample in range(SAMPLES):
                prompt, response = self._draw(8), self._draw(10)
                tokens, mask = torch.cat([prompt, response]), torch.ones_like(response)
                rewards = torch.zeros(len(response))
                rewards[-1] = float(response[0] % 2 == 0)
                keys.append(f"{uid}_{sample}_0")
                fields.append(
                    {
                        "uid": uid,
                        "prompts": prompt,
                        "responses": response,
                        "input_ids": tokens,
                        "position_ids": torch.arange(len(tokens)),
                        "response_mask": mask,
                        "loss_mask": mask,
                        "rm_scores": rewards,
                        "rollout_log_probs": torch.full((len(response),), -5.0),
                        "num_turns": 1,
                        "extra_fields": {},
                    }
                )
                lengths = {"prompt_len": len(prompt), "response_len": len(response), "seq_len": len(tokens)}
                steps = dict.fromkeys(("global_steps", "min_global_steps", "max_global_steps"), step)
                tags.append({"status": "success", **lengths, **steps})
            rows = list_of_dict_to_tensordict(fields)
            transfer_queue.kv_batch_put(keys=keys, fields=rows, tags=tags, partition_id="train")
            transfer_queue.kv_put(key=uid, partition_id="train", tag={"status": "finished"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and a prepared critic."""
    folder = tmp_path_factory.mktemp("ppo")
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{i} + 1 ="}],
            "data_source": "sums",
            "reward_model": {"style": "rule", "ground_truth": str(i + 1)},
            "extra_info": {"index": i},
        }
        for i in range(16)
    ]
    pandas.DataFrame(rows).to_parquet(folder / "data.parquet")
    settings = packaged_settings()
    settings["critic"]["num_quantiles"] = 8
    prepare(model_folder(), folder / "critic", settings)
    return folder


def run_config(folder: Path, *overrides: str) -> Any:
    """The packaged config, as one would override it on a command line, for a machine without an accelerator."""
    exact = "{param_dtype: fp32, reduce_dtype: fp32}"
    tiny = [
        f"data.train_files={folder}/data.parquet",
        f"data.val_files={folder}/data.parquet",
        f"data.train_batch_size={PROMPTS}",
        "data.dataloader_num_workers=0",
        f"actor_rollout_ref.model.path={model_folder()}",
        "actor_rollout_ref.model.use_remove_padding=False",
        "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={PROMPTS}",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2",
        "actor_rollout_ref.actor.fsdp_config.use_torch_compile=False",
        f"+actor_rollout_ref.actor.fsdp_config.mixed_precision={exact}",
        "actor_rollout_ref.actor.optim.lr=1e-3",
        "actor_rollout_ref.rollout.name=scripted",
        f"actor_rollout_ref.rollout.n={SAMPLES}",
        "actor_rollout_ref.rollout.tensor_model_parallel_size=1",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=2",
        f"critic.model.path={folder}/critic",
        "critic.model.use_remove_padding=False",
        "+critic.model.override_config.attn_implementation=sdpa",
        "critic.ppo_max_token_len_per_gpu=64",
        f"+critic.fsdp.mixed_precision={exact}",
        "critic.optim.lr=1e-2",
        "critic.checkpoint.save_contents=[model,optimizer,extra,hf_model]",
        "dvpo.critic.num_quantiles=8",
        "reward.num_workers=1",
        "trainer.n_gpus_per_node=2",
        "trainer.device=cpu",
        "trainer.logger=[console]",
        "trainer.val_before_train=False",
        f"trainer.default_local_dir={folder}/checkpoints",
        "transfer_queue.enable=True",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
    ]
    with initialize_config_module("dvpo.integrations.verl.config", version_base=None):
        config = compose("dvpo", overrides=[*tiny, *overrides])
    OmegaConf.resolve(config)
    return config


@pytest.fixture
def queue(cluster: None, folder: Path) -> Iterator[None]:
    transfer_queue.init(run_config(folder).transfer_queue)
    yield
    transfer_queue.close()


@pytest.mark.usefixtures("queue")
@pytest.mark.timeout(900)
def test_three_steps_train_both_modules_and_a_fourth_goes_on_from_the_checkpoint(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(trainer_base, "LLMServerManager", NoServers)
    monkeypatch.setattr(trainer_base, "Tracking", Recorder)
    train(run_config(folder, "trainer.total_training_steps=3", "trainer.save_freq=3"))
    rows = Recorder.rows
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        figures = ("critic/qr", "critic/consistency", "critic/grad_norm", "actor/pg_loss", "actor/grad_norm")
        assert all(abs(float(row[name])) < float("inf") for name in figures)
        assert float(row["critic/grad_norm"]) > 0 < float(row["actor/grad_norm"])
    assert abs(rows[0]["critic/values/mean"]) < 0.05  # fresh heads know nothing
    assert abs(rows[2]["critic/values/mean"] - rows[0]["critic/values/mean"]) > 0.05
    saved = load_critic(folder / "checkpoints" / "global_step_3" / "critic" / "critic")
    fresh = load_critic(folder / "critic")
    assert not torch.equal(saved.heads.linear.weight, fresh.heads.linear.weight)

    train(run_config(folder, "trainer.total_training_steps=4"))
    assert [row["step"] for row in Recorder.rows] == [4]
    assert abs(Recorder.rows[0]["critic/values/mean"] - rows[0]["critic/values/mean"]) > 0.05


def train(config: Any) -> None:
    """As verl's task runner does, and the workers are gone afterwards."""
    trainer = get_trainer_cls(config.trainer.v1.trainer_mode)(config=config)
    trainer.init()
    trainer.fit(Script())
    for actor in (*trainer.critic_wg.workers, *trainer.reward_loop_manager.reward_loop_workers):
        ray.kill(actor)
    for pool in trainer.resource_pool_manager.resource_pool_dict.values():
        for placed in pool.pgs:
            ray.util.remove_placement_group(placed)


def test_settings_that_cannot_be_followed_are_refused_before_any_worker_starts(folder: Path):
    for override, reason in {
        "algorithm.adv_estimator=grpo": "algorithm.adv_estimator = grpo: dvpo's critic needs gae",
        "critic.strategy=fsdp": "critic.strategy = fsdp: dvpo's critic needs fsdp2",
        "+dvpo.advantage.law={functional: rank}": "dvpo.advantage.law.functional = rank cannot be followed",
        "+dvpo.critic.num_quantile=8": "did you mean critic.num_quantiles",
        "dvpo.algorithm=ppo": "dvpo.algorithm = ppo has a scalar critic",
    }.items():
        config = run_config(folder, override)
        with pytest.raises(InputError, match=reason):
            get_trainer_cls("dvpo")(config=config)
