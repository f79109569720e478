"""verl finds the plug-in by itself, in every process; its config is found from anywhere; the self-check tells."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray
import yaml
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import omega_conf_to_dataclass, validate_config

from dvpo.integrations.verl.prepare import packaged_settings, prepare
from dvpo.integrations.verl.trainer import read_objective
from runs import model_folder

FRESH = {key: value for key, value in os.environ.items() if not key.startswith(("VERL_", "PYTHONPATH"))}
CHECK = ["-m", "dvpo.integrations.verl.check"]
MAIN = ["-m", "verl.trainer.main_ppo", "--config-path=pkg://dvpo.integrations.verl.config", "--config-name=dvpo"]
SCRIPT = Path(__file__).parents[2] / "examples" / "verl" / "qwen3_8b_8_gpus.sh"


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        cwd=cwd,
        env={**FRESH, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_importing_verl_is_enough_to_know_the_mode(tmp_path: Path):
    code = "import verl; from verl.trainer.ppo.v1 import get_trainer_cls; print(get_trainer_cls('dvpo').__module__)"
    assert run("-c", code, cwd=tmp_path).stdout.strip() == "dvpo.integrations.verl.trainer"


@pytest.mark.usefixtures("cluster")
def test_a_process_that_ray_starts_knows_it_too():
    @ray.remote
    def module_of_the_trainer() -> str:
        import verl  # noqa: F401
        from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY

        return TRAINER_REGISTRY["dvpo"].__module__

    assert ray.get(module_of_the_trainer.remote()) == "dvpo.integrations.verl.trainer"


def test_the_check_says_that_it_is_loaded_and_how_it_is_used(tmp_path: Path):
    done = run(*CHECK, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "is loaded in verl" in done.stdout
    assert "trainer.v1.trainer_mode=dvpo" in done.stdout


def test_the_check_names_what_keeps_it_out(tmp_path: Path):
    done = run(*CHECK, cwd=tmp_path, VERL_USE_EXTERNAL_PLUGINS="none")
    assert done.returncode == 1
    assert "dvpo: VERL_USE_EXTERNAL_PLUGINS = none keeps it out: unset it, or name dvpo in it" in done.stderr


def test_the_check_shows_the_error_that_verl_hides(tmp_path: Path):
    """A broken dependency of ours: verl goes on without the plug-in and says nothing."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "pydantic.py").write_text("raise ImportError('no pydantic here')")
    environment = {"PYTHONPATH": str(tmp_path / "broken")}
    code = "import dvpo.integrations.verl.plugin"
    assert "no pydantic here" in run("-c", code, cwd=tmp_path, **environment).stderr
    done = run(*CHECK, cwd=tmp_path, **environment)
    assert done.returncode == 1
    assert "no pydantic here" in done.stderr


def test_verls_own_command_composes_the_packaged_config_from_anywhere(tmp_path: Path):
    overrides = ["dvpo.critic.num_quantiles=50", "trainer.n_gpus_per_node=4", "algorithm.lam=0.9"]
    done = run(*MAIN, *overrides, "--cfg", "job", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    config = yaml.safe_load(done.stdout)
    assert config["dvpo"]["critic"]["num_quantiles"] == 50
    assert config["trainer"]["v1"]["trainer_mode"] == "dvpo"
    assert (config["algorithm"]["adv_estimator"], config["algorithm"]["lam"]) == ("gae", 0.9)
    assert (config["critic"]["strategy"], config["critic"]["_target_"]) == (
        "fsdp2",
        "verl.workers.config.FSDPCriticConfig",
    )
    assert config["actor_rollout_ref"]["actor"]["strategy"] == "fsdp2"
    assert "sync" in config["trainer"]["v1"]  # verl's own keys are still there


def test_verl_takes_the_settings_of_the_script_for_eight_gpus(tmp_path: Path):
    """Run with a Python that notes what it is asked for; the settings are then composed and validated by verl."""
    stub = tmp_path / "bin" / "python"
    stub.parent.mkdir()
    stub.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >> {tmp_path}/asked\n')
    stub.chmod(0o755)
    critic = tmp_path / "critic"
    prepare(model_folder(), critic, packaged_settings())
    given = {
        "MODEL": model_folder(),
        "CRITIC": str(critic),
        "TRAIN": "a.parquet",
        "TEST": "b.parquet",
        "REWARD": "r.py",
    }
    path = f"{stub.parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run([SCRIPT, "trainer.nnodes=2"], env={**FRESH, **given, "PATH": path}, check=True)
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked[:2] == CHECK
    assert asked[2:6] == MAIN
    with initialize_config_module("dvpo.integrations.verl.config", version_base=None):
        config = compose("dvpo", overrides=asked[6:])
    OmegaConf.resolve(config)
    validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
    read_objective(config)
    critic_config = omega_conf_to_dataclass(config.critic)
    assert critic_config.ppo_infer_max_token_len_per_gpu == 16384
    assert (critic_config.engine.strategy, critic_config.engine.param_offload) == ("fsdp2", True)
    assert config.trainer.nnodes == 2
