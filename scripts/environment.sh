# Sourced by scripts/quickstart, scripts/test and scripts/check: makes the environment once, then activates it.
# EXTRAS names the optional dependencies to have ("test"); SLUICE_TORCH is the torch version to install.
venv="${SLUICE_VENV:-.venv}"
python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "error: $("$python" --version) is too old: Sluice needs Python 3.11 or newer; name one with PYTHON=python3.12" >&2
  exit 2
}
stamp="$venv/.sluice-$(cat pyproject.toml scripts/environment.sh | cksum | cut -d' ' -f1)-${EXTRAS:-none}"
if [ ! -f "$stamp" ]; then
  echo "making the environment in $venv (once; a minute or two)" >&2
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --upgrade pip >&2
  if ! "$venv/bin/python" -c 'import torch' 2>/dev/null && ! command -v nvidia-smi >/dev/null; then
    # where plain torch brings gigabytes of CUDA, set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU builds
    "$venv/bin/python" -m pip install --quiet "torch==${SLUICE_TORCH:-2.13.0}" >&2
  fi
  "$venv/bin/python" -m pip install --quiet --editable ".${EXTRAS:+[$EXTRAS]}" >&2
  touch "$stamp"
fi
source "$venv/bin/activate"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
