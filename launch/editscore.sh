#!/usr/bin/env bash
# Merges EditScore's LoRA into its base and serves it with vLLM, a process a GPU; prints the addresses for a run.
#
# usage: launch/editscore.sh LORA [FLAGS]
#        launch/editscore.sh status|stop [--directory DIR]
#
# LORA is a folder, or a name on the hub. The same command again finds what is there: environment, model, servers.
#
# flags:
#   --base NAME           the base, a folder or a name on the hub (default: the one that the LoRA names)
#   --directory DIR       for the environment, the merged model, logs and locks (default: runs/editscore)
#   --gpus N,N,...        GPUs, one server each (default: all that nvidia-smi lists)
#   --port N              of the first server; the next ones follow (default: 8000)
#   --host NAME           what a run calls this machine (default: its host name)
#   --max-model-len N     tokens of a question with its answer (default: 4096, for 1024 x 1024 pixels)
#   --dry-run             print every command and run none
#
# VLLM_API_KEY in the environment is a token that the servers then ask for; the reward's option token_variable names it.

set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/lib.sh
. launch/lib.sh
# shellcheck source=launch/venv.sh
. launch/venv.sh

packages=(vllm==0.33.0 peft==0.21.2)
poll=${RCGRPO_LAUNCH_POLL:-5} # seconds between two questions whether a server is there
patience=1800                 # seconds that a server has to load its model
action=serve lora="" base="" directory=runs/editscore gpus="" port=8000 host="" max_model_len=4096

word() {
  [ "$action" = serve ] || fail 2 "'$1' found after $action; nothing was wanted." "Leave it out."
  [ -z "$lora" ] || fail 2 "'$1' found after '$lora'; one LoRA was wanted." "Leave one out."
  lora=$1
}

check() {
  local name
  for name in port max_model_len; do
    [[ ${!name} =~ ^[1-9][0-9]*$ ]] ||
      fail 2 "--${name//_/-}: '${!name}' found; a positive integer was wanted." "Correct it."
  done
  [[ $gpus =~ ^([0-9]+(,[0-9]+)*)?$ ]] ||
    fail 2 "--gpus: '$gpus' found; numbers with commas were wanted." "For example --gpus 0,1."
  [ "$action" != serve ] || [ "$lora" ] ||
    fail 2 "no LoRA found; the folder or the name of one was wanted." "launch/editscore.sh --help says more."
}

running() { ! flock --nonblock "$1" true; } # LOCK: a server and its children hold theirs as long as they live

install() {
  [ "$dry_run" ] || mkdir -p "$directory"
  run make_venv "$directory/venv"
  run "$directory/venv/bin/pip" install --quiet --disable-pip-version-check "${packages[@]}"
}

merge() {
  local merged=$directory/model of
  of=$(quote "$lora" "$base")
  if [ -d "$merged" ]; then
    [ "$of" = "$(cat "$directory/merged")" ] ||
      fail 1 "$merged: merged of $(cat "$directory/merged") found; $of was wanted." "Choose another --directory."
    return
  fi
  # A model that is not whole has another name.
  run "$directory/venv/bin/python" launch/merge_lora.py "$lora" "$base" "$merged.partial"
  [ "$dry_run" ] || echo "$of" >"$directory/merged"
  run mv "$merged.partial" "$merged"
}

serve() { # GPU PORT
  local at=$directory/$2
  # No cache of pictures: after a sleep of the engine it would hand out pictures that the engine has forgotten.
  local command=("$directory/venv/bin/vllm" serve "$directory/model" --served-model-name editscore --port "$2"
    --max-num-seqs 64 --max-model-len "$max_model_len" --limit-mm-per-prompt '{"image": 2}' --enable-prefix-caching
    --mm-processor-cache-gb 0)
  if [ "$dry_run" ]; then
    show env "CUDA_VISIBLE_DEVICES=$1" "${command[@]}"
    return
  fi
  exec 9>"$at.lock"
  if flock --nonblock 9; then
    show env "CUDA_VISIBLE_DEVICES=$1" "${command[@]}"
    CUDA_VISIBLE_DEVICES=$1 setsid "${command[@]}" >"$at.log" 2>&1 </dev/null 3>&- & # inherits the lock
    echo $! >"$at.pid"
  fi
  exec 9>&-
}

healthy() { curl --fail --silent --max-time 10 --output /dev/null "http://localhost:$1/health"; } # PORT

await() { # PORT
  local end=$((SECONDS + patience))
  if [ "$dry_run" ]; then
    show curl --fail "http://localhost:$1/health"
    return
  fi
  until healthy "$1"; do
    if ! running "$directory/$1.lock"; then
      tail --lines=20 "$directory/$1.log" >&2
      fail 1 "the server at port $1 has ended; its last lines are above." "All are in $directory/$1.log."
    fi
    [ "$SECONDS" -lt "$end" ] || fail 1 "the server at port $1 does not answer." "$directory/$1.log says how far it is."
    sleep "$poll"
  done
}

start() {
  local listed numbers i urls=""
  if [ -z "$gpus" ]; then
    listed=$(ask nvidia-smi --query-gpu=index --format=csv,noheader) ||
      fail 1 "no GPU found; nvidia-smi was asked." "Run this where the GPUs are, or name them with --gpus."
    gpus=${listed//$'\n'/,}
  fi
  IFS=, read -ra numbers <<<"${gpus:-0}"
  install
  merge
  for i in "${!numbers[@]}"; do serve "${numbers[i]}" $((port + i)); done
  for i in "${!numbers[@]}"; do
    await $((port + i))
    urls+=,http://${host:-$(hostname)}:$((port + i))/v1
  done
  echo "--config.reward_options.editscore.model=editscore --config.reward_options.editscore.urls=${urls#,}"
}

each_server() { # FUNCTION, of each port that was served
  local lock found=""
  for lock in "$directory"/*.lock; do
    [ -e "$lock" ] || continue
    lock=${lock##*/} found=yes
    "$1" "${lock%.lock}"
  done
  [ "$found" ] || fail 1 "$directory: no server found." "Name the --directory that was served from."
}

say_status() {
  local state="ended"
  if running "$directory/$1.lock"; then
    state="starts"
    ! healthy "$1" || state="answers"
  fi
  echo "port $1: $state"
}

stop_server() {
  ! running "$directory/$1.lock" || run kill -TERM "$(cat "$directory/$1.pid")"
  [ "$dry_run" ] || flock --timeout 60 "$directory/$1.lock" true ||
    fail 1 "the server at port $1 has not ended in a minute." "End process $(cat "$directory/$1.pid") by hand."
}

case ${1-} in
  "" | help)
    usage
    [ $# -gt 0 ] || exit 2
    exit
    ;;
  status | stop)
    action=$1
    shift
    ;;
esac
parse "base|directory|gpus|port|host|max-model-len" "" "" "" "$@"
check
case $action in
  serve) start ;;
  status) each_server say_status ;;
  stop) each_server stop_server ;;
esac
