#!/bin/sh
# A vLLM server that dvpo can sample from: sampling.engine: vllm, docs/scale.md#sampling-by-vllm.
#
#     sh examples/vllm/serve.sh MODEL MAX_LENGTH [further options of `vllm serve`]
#
# MODEL       model.path of the run: a folder or a hub name
# MAX_LENGTH  sampling.max_prompt_length + sampling.max_completion_length of the run
#
# In an environment of its own (pip install -r requirements/vllm.txt), on a GPU that the trainer does not use
# (CUDA_VISIBLE_DEVICES=1 sh examples/vllm/serve.sh ...); --tensor-parallel-size N takes several.
#
# The development routes let whoever reaches the port replace the weights: keep it inside your own network.
set -eu
model=$1
length=$2
shift 2
export VLLM_SERVER_DEV_MODE=1
exec vllm serve "$model" \
    --host "${HOST:-127.0.0.1}" --port "${PORT:-8000}" \
    --max-model-len "$length" \
    --logprobs-mode processed_logprobs \
    --generation-config vllm \
    --enable-prefix-caching \
    "$@"
