"""The script that starts a vLLM server: what it asks of vLLM, seen by a `vllm` that only writes that down."""

import os
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "examples" / "vllm" / "serve.sh"


def test_it_starts_the_server_that_the_sampler_needs(tmp_path: Path):
    vllm = tmp_path / "vllm"
    vllm.write_text('#!/bin/sh\necho "$VLLM_SERVER_DEV_MODE" "$@"\n')
    vllm.chmod(0o755)
    place = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PORT": "8123"}
    command = ["sh", str(SCRIPT), "my model", "5120", "--tensor-parallel-size", "2"]
    said = subprocess.run(command, env=place, check=True, capture_output=True, text=True).stdout.split()
    assert said[:4] == ["1", "serve", "my", "model"]
    options = " ".join(said[4:])
    for option in (
        "--host 127.0.0.1 --port 8123",
        "--max-model-len 5120",
        "--logprobs-mode processed_logprobs",
        "--generation-config vllm",
        "--tensor-parallel-size 2",
    ):
        assert option in options
    assert subprocess.run(command[:3], env=place, check=False, capture_output=True).returncode != 0  # no length
