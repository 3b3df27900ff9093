#!/usr/bin/env bash
# Sets up a virtual environment and runs the main job on photographs. Usage: bash launch/demo.sh [OUT]
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/venv.sh
. launch/venv.sh

make_venv .venv
.venv/bin/pip install --quiet --disable-pip-version-check --editable '.[demo]'
exec .venv/bin/rcgrpo demo --out "${1:-runs/demo}"
