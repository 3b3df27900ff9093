#!/usr/bin/env bash
# Runs `rcgrpo` on GPUs: of this machine, of several by ssh, or of a Slurm cluster. A process has all of a machine's.
#
# usage: launch/gpu.sh [FLAGS] -- ARGUMENTS OF RCGRPO
#        launch/gpu.sh ACTION --hosts HOST,...
#
# without --hosts or --slurm: this machine, until rcgrpo ends; Ctrl-C and SIGTERM let it save first
#
# flags:
#   --hosts HOST,...         these machines, by ssh; the same command attaches again if the connection was lost
#   --coordinator HOST:PORT  where the others find the first of them (default: the first host, port 12355)
#   --env NAME=VALUE         with --hosts: set for rcgrpo; may be repeated
#   --slurm                  a Slurm job; inside of an allocation, a step of it
#   --nodes N                with --slurm: machines (default 1)
#   --gpus N                 with --slurm: GPUs of each (default 8)
#   --sbatch FLAG            with --slurm: one more flag of sbatch, such as --partition=gpu; may be repeated
#   --requeue                with --slurm, in a batch job: back into the queue when SIGTERM has stopped rcgrpo
#   --dry-run                print every command and run none
#
# actions, for what a command with --hosts started:
#   logs     follow the output of all hosts to its end; the exit status is that of rcgrpo
#   status   how rcgrpo stands on every host
#   stop     tell rcgrpo to save and end

set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/lib.sh
. launch/lib.sh

extra=cuda
poll=${RCGRPO_LAUNCH_POLL:-30} # seconds before a lost connection is made again
tries=3                        # connections that may fail in a row
action=run hosts="" coordinator="" slurm="" nodes="" gpus="" requeue=""
sbatch=()

check() {
  local flag twice
  for flag in nodes gpus; do
    [[ ${!flag:-1} =~ ^[1-9][0-9]*$ ]] ||
      fail 2 "--$flag: '${!flag}' found; a positive integer was wanted." "Correct it."
  done
  for flag in nodes gpus requeue sbatch; do
    [ "$slurm" ] || [ -z "${!flag-}" ] || fail 2 "--$flag found without --slurm." "Add --slurm, or leave it out."
  done
  for flag in coordinator env; do
    [ ${#hosts[@]} -gt 0 ] || [ -z "${!flag-}" ] ||
      fail 2 "--$flag found without --hosts." "Add --hosts, or set variables before the command."
  done
  [ -z "$slurm" ] || [ ${#hosts[@]} = 0 ] || fail 2 "--slurm and --hosts found; one was wanted." "Leave one out."
  for flag in nodes gpus sbatch; do
    [ -z "${SLURM_JOB_ID:-}" ] || [ -z "$slurm" ] || [ -z "${!flag-}" ] ||
      fail 2 "--$flag found inside of an allocation, whose machines are given." "Leave it out."
  done
  [ -z "$coordinator" ] || [[ $coordinator =~ ^[^:]+:[0-9]+$ ]] ||
    fail 2 "--coordinator: '$coordinator' found; HOST:PORT was wanted." "For example ${hosts[0]#*@}:12355."
  twice=$(printf '%s\n' ${hosts[@]+"${hosts[@]}"} | sort | uniq -d | head -n 1)
  [ -z "$twice" ] || fail 2 "--hosts: '$twice' found twice; a process has all GPUs of its host." "Name each once."
  if [ "$action" = run ]; then
    need_arguments
    [ ${#hosts[@]} = 0 ] || check_sent
    case $(argument --workdir) in "" | /* | gs://?*) ;; *)
      [ ${#hosts[@]} -lt 2 ] ||
        fail 2 "--workdir: '$(argument --workdir)' found, which every host has for itself; one that all see was wanted." \
          "Name it by its absolute path."
      ;;
    esac
  elif [ ${#hosts[@]} = 0 ]; then
    fail 2 "--hosts: nothing found; the hosts to $action were wanted." "Repeat those of the command that started it."
  fi
}

on_workers() { # SHELL [FILE]
  local i command pids=() pid status=0 cluster
  cluster=("RCGRPO_COORDINATOR=${coordinator:-${hosts[0]#*@}:12355}" "RCGRPO_NUM_PROCESSES=${#hosts[@]}")
  for i in "${!hosts[@]}"; do
    command=(ssh -o BatchMode=yes -o ConnectTimeout=15 -o ServerAliveInterval=30 "${hosts[i]}"
      "export $(quote "${cluster[@]}" "RCGRPO_PROCESS_ID=$i"); $1")
    show "${command[@]}"
    [ -z "$dry_run" ] || continue
    "${command[@]}" <"${2:-/dev/null}" 3>&- &
    pids+=($!)
  done
  [ -z "$dry_run" ] || return 0
  for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
  return "$status"
}

follow() { # until rcgrpo has ended; its exit status
  local lost=0 result
  trap 'kill $(jobs -p) 2>/dev/null || true; say "rcgrpo goes on; the same command attaches again, stop ends it"; exit 130' INT
  while true; do
    on_workers "$(far follow)" || true
    result=$(outcome)
    [ "$result" = lost ] || lost=0
    case $result in
      running) ;;
      stopped) exit 143 ;;
      lost)
        lost=$((lost + 1))
        [ "$lost" -lt "$tries" ] ||
          fail 1 "${hosts[*]}: not all can be reached." "Try ssh to each; then run the same command again."
        ;;
      *) exit "$result" ;;
    esac
    sleep "$poll"
  done
}

over_ssh() {
  case $action in
    run)
      pack
      start || fail 1 "${hosts[*]}: the command could not be started on all." "ssh says why above; then run it again."
      follow
      ;;
    logs) follow ;;
    status | stop) on_workers "$(far "$action")" ;;
  esac
}

here() {
  run bash launch/lib_worker.sh setup "$extra"
  show bash launch/lib_worker.sh task "${arguments[@]}"
  [ "$dry_run" ] || exec bash launch/lib_worker.sh task "${arguments[@]}" 3>&-
}

submit() {
  local flags=(--job-name=rcgrpo "--nodes=${nodes:-1}" --ntasks-per-node=1 "--gpus-per-node=${gpus:-8}")
  # The same file after a requeue; and time to save before the time limit: the signal goes to the tasks.
  flags+=(--requeue --open-mode=append --signal=TERM@300)
  [ ${#sbatch[@]} = 0 ] || flags+=("${sbatch[@]}")
  run bash launch/lib_worker.sh setup "$extra"
  run sbatch "${flags[@]}" \
    --wrap="cd $(quote "$PWD") && exec bash launch/gpu.sh --slurm --requeue -- $(quote "${arguments[@]}")"
}

step() { # of the allocation that this runs in
  local code=0
  [ -x .venv/bin/rcgrpo ] || run bash launch/lib_worker.sh setup "$extra"
  # A task that has saved and ended must not kill one that still saves.
  run srun "--nodes=$SLURM_JOB_NUM_NODES" "--ntasks=$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpu-bind=none \
    --kill-on-bad-exit=0 bash launch/lib_worker.sh task "${arguments[@]}" || code=$?
  [ "$code" != 143 ] || [ -z "$requeue" ] || run scontrol requeue "$SLURM_JOB_ID"
  exit "$code"
}

case ${1-} in
  "" | -h | --help | help)
    usage
    [ $# -gt 0 ] || exit 2
    exit
    ;;
  logs | status | stop)
    action=$1
    shift
    ;;
esac
parse "hosts|coordinator|nodes|gpus" "env|sbatch" "slurm|requeue" "what rcgrpo gets follows --" "$@"
IFS=, read -ra hosts <<<"$hosts"
check
if [ ${#hosts[@]} -gt 0 ]; then
  over_ssh
elif [ -z "$slurm" ]; then
  here
elif [ "${SLURM_JOB_ID:-}" ]; then
  step
else
  submit
fi
