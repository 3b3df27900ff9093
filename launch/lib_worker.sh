#!/usr/bin/env bash
# What runs on a worker: `rcgrpo` from this checkout, in the foreground or detached from the connection that started it.
#
#   lib_worker.sh setup EXTRA             the virtual environment, with an extra of the package: tpu or cuda
#   lib_worker.sh task ARGUMENTS          rcgrpo; exit status 143 if SIGTERM stopped it
#   lib_worker.sh start EXTRA ARGUMENTS   setup and task, detached; prints where that stands
#   lib_worker.sh follow                  the output, to its end
#   lib_worker.sh status                  running COMMAND, exit CODE COMMAND, or killed COMMAND
#   lib_worker.sh stop                    SIGTERM: rcgrpo saves and ends

set -euo pipefail
cd "$(dirname "$0")/.."
state=$(dirname "$PWD") # of a detached command: lock (held while it runs), pid, command, exit (once it ended), log

setup() {
  # shellcheck source=launch/venv.sh
  . launch/venv.sh
  # The images of Cloud TPU have Python 3.10.
  if [ "$1" = tpu ] && [ -z "${PYTHON:-}" ] && ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    python3 -m pip install --quiet --user uv
    python3 -m uv python install --quiet 3.12
    PYTHON=$(python3 -m uv python find 3.12)
  fi
  make_venv .venv
  .venv/bin/pip install --quiet --disable-pip-version-check --editable ".[$1]"
}

mount_bucket() { # BUCKET, at /gcs/BUCKET: rcgrpo reads and writes files
  local directory=/gcs/$1 packages=https://packages.cloud.google.com/apt key=/usr/share/keyrings/cloud.google.asc
  ! mountpoint --quiet "$directory" || return 0
  if ! command -v gcsfuse >/dev/null; then
    curl --fail --silent --show-error "$packages/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
    echo "deb [signed-by=$key] $packages gcsfuse-$(lsb_release -cs) main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    sudo apt-get update -qq
    sudo apt-get install -y -qq gcsfuse
  fi
  sudo mkdir -p "$directory"
  sudo chown "$(id -u)" "$directory"
  # No cache of metadata: workers see at once what another has written. A finished checkpoint is a renamed directory,
  # which a bucket without hierarchical namespace has only up to a number of files, none by default.
  gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 --rename-dir-limit=200000 \
    "$1" "$directory"
}

task() {
  local word words=() child code=0
  local bucket='^(.*=)?gs://([^/]+)(.*)$'
  for word in "$@"; do
    if [[ $word =~ $bucket ]]; then
      mount_bucket "${BASH_REMATCH[2]}" >&2 9>&- || return
      word=${BASH_REMATCH[1]}/gcs/${BASH_REMATCH[2]}${BASH_REMATCH[3]}
    fi
    words+=("$word")
  done
  if command -v nvidia-smi >/dev/null; then
    # As plan/gpu.py has them, which says why. What the user sets comes last and wins.
    export XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true --xla_gpu_enable_triton_gemm=false ${XLA_FLAGS:-}"
    export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"
    # Under Slurm, JAX takes one GPU a process unless told; here a process takes its node's.
    if [ "${SLURM_PROCID:-}" ]; then
      export JAX_LOCAL_DEVICE_IDS="${JAX_LOCAL_DEVICE_IDS:-$(
        seq -s , 0 $((${SLURM_GPUS_ON_NODE:-$(nvidia-smi --list-gpus | wc -l)} - 1))
      )}"
    fi
  fi
  .venv/bin/rcgrpo "${words[@]}" 9>&- &
  child=$!
  trap 'kill -TERM "$child" 2>/dev/null || true' TERM INT # rcgrpo saves, and ends with 143
  wait "$child" || code=$?
  while kill -0 "$child" 2>/dev/null; do # a signal ends `wait` before the child ends
    code=0
    wait "$child" || code=$?
  done
  return "$code"
}

start() {
  local command
  printf -v command '%q ' rcgrpo "${@:2}"
  command=${command% }
  exec 9>"$state/lock"
  if flock --nonblock 9; then
    rm -f "$state/exit"
    echo "$command" >"$state/command"
    setsid bash launch/lib_worker.sh job "$@" >"$state/log" 2>&1 </dev/null & # inherits the lock
    echo $! >"$state/pid"
  elif [ "$command" != "$(cat "$state/command")" ]; then
    echo "rcgrpo: busy $(cat "$state/command")"
    return
  fi
  echo "rcgrpo: running $command"
}

job() {
  local code=0
  bash launch/lib_worker.sh setup "$1" 9>&- || code=$?
  [ "$code" != 0 ] || task "${@:2}" || code=$?
  echo "$code" >"$state/exit"
}

running() { ! flock --nonblock "$state/lock" true; }

follow() {
  local last=()
  ! running || last=(--follow --sleep-interval=0.2 --pid="$(cat "$state/pid")")
  tail --lines=100 "${last[@]}" "$state/log"
}

status() {
  local command
  command=$(cat "$state/command")
  if running; then
    echo "rcgrpo: running $command"
  elif [ -e "$state/exit" ]; then
    echo "rcgrpo: exit $(cat "$state/exit") $command"
  else
    echo "rcgrpo: killed $command"
  fi
}

stop() { ! running || kill -TERM "$(cat "$state/pid")"; }

"$@"
