#!/usr/bin/env bash
# Sets up a virtual environment and goes the whole way on the small editor. Usage: bash launch/demo.sh [OUT]
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/venv.sh
. launch/venv.sh

make_venv .venv
.venv/bin/pip install --quiet --disable-pip-version-check --editable '.[evaluate]'
exec .venv/bin/rcgrpo demo --out "${1:-runs/demo}"
