#!/usr/bin/env bash
# DVPO on eight GPUs of 80 GB in verl: docs/verl.md. NOT RUN: no such machine was at hand. That verl accepts these settings
# is tested (tests/with_verl/test_plugin.py); memory and speed are guesses.
#
#     MODEL=Qwen/Qwen3-8B TRAIN=train.parquet TEST=test.parquet REWARD=my_reward.py examples/verl/qwen3_8b_8_gpus.sh
#
# TRAIN, TEST  prompts in verl's format: columns prompt (messages), data_source, reward_model, extra_info
# REWARD       a file with verl's compute_score(data_source, solution_str, ground_truth, extra_info)
#
# More machines: a Ray cluster with dvpo installed on every node, and NODES=4. What follows on the command line wins.
set -euo pipefail
MODEL=${MODEL:-Qwen/Qwen3-8B}
CRITIC=${CRITIC:-critics/$(basename "$MODEL")}
OUTPUT=${OUTPUT:-runs/verl-dvpo}

python -m dvpo.integrations.verl.check
[ -e "$CRITIC/critic.json" ] || python -m dvpo.integrations.verl.prepare "$MODEL" "$CRITIC"

exec python -m verl.trainer.main_ppo \
    --config-path=pkg://dvpo.integrations.verl.config --config-name=dvpo \
    data.train_files="$TRAIN" data.val_files="$TEST" \
    data.train_batch_size=64 data.max_prompt_length=1024 data.max_response_length=4096 \
    data.filter_overlong_prompts=True \
    reward.custom_reward_function.path="$REWARD" \
    actor_rollout_ref.model.path="$MODEL" \
    actor_rollout_ref.actor.optim.lr=1e-6 \
    actor_rollout_ref.actor.ppo_mini_batch_size=32 \
    actor_rollout_ref.actor.use_dynamic_bsz=True \
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384 \
    actor_rollout_ref.actor.fsdp_config.param_offload=True \
    actor_rollout_ref.actor.fsdp_config.optimizer_offload=True \
    actor_rollout_ref.rollout.name=vllm \
    actor_rollout_ref.rollout.n=8 \
    actor_rollout_ref.rollout.tensor_model_parallel_size=2 \
    actor_rollout_ref.rollout.gpu_memory_utilization=0.5 \
    critic.model.path="$CRITIC" \
    critic.optim.lr=1e-5 \
    critic.ppo_mini_batch_size=32 \
    critic.ppo_max_token_len_per_gpu=16384 \
    critic.fsdp.param_offload=True \
    critic.fsdp.optimizer_offload=True \
    critic.checkpoint.save_contents=[model,optimizer,extra,hf_model] \
    trainer.critic_warmup=10 \
    trainer.n_gpus_per_node=8 trainer.nnodes="${NODES:-1}" \
    trainer.total_training_steps=500 trainer.save_freq=50 trainer.test_freq=50 \
    trainer.logger=[console] \
    trainer.default_local_dir="$OUTPUT" \
    "$@"
