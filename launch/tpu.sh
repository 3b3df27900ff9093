#!/usr/bin/env bash
# Runs `rcgrpo` on a Cloud TPU slice, or several: creates it, installs this checkout, resumes after preemption.
#
# usage: launch/tpu.sh ACTION --name NAME --zone ZONE [FLAGS] [-- ARGUMENTS OF RCGRPO]
#
# actions:
#   train    up, run, logs; all again after a preemption; down once rcgrpo has succeeded
#   up       create the queued resource, or use the one of this name, and wait until it can be used
#   run      send this checkout to all workers and start rcgrpo on them; does not wait for it
#   logs     follow the output of all workers to its end; the exit status is that of rcgrpo
#   status   the state of the TPU, and of rcgrpo on every worker
#   stop     tell rcgrpo to save and end
#   down     delete the queued resource and its TPU VMs
#
# flags:
#   --type TYPE            accelerator type: v5litepod-16, v5p-64, v6e-8, ...
#   --version VERSION      software of the TPU VMs; by default the one of JAX for the type
#   --slices N             slices of that type (default 1)
#   --spot, --reserved     which capacity; on demand by default
#   --direct               a TPU VM that is created at once, without a queue
#   --project PROJECT      by default the one of gcloud
#   --env NAME=VALUE       set for rcgrpo; may be repeated
#   --gcloud-create FLAG   one more flag of `gcloud ... create`, such as --internal-ips; may be repeated
#   --gcloud-ssh FLAG      one more flag of `gcloud ... ssh` and `scp`, such as --tunnel-through-iap; may be repeated
#   --keep                 train: leave the TPU there at the end
#   --dry-run              print every command and run none
#
# gs://BUCKET/... in the arguments of rcgrpo is mounted on the workers. docs/launch.md tells more.

set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/lib.sh
. launch/lib.sh

extra=tpu
poll=${RCGRPO_LAUNCH_POLL:-30} # seconds between two looks at a state
tries=3                        # attempts that may fail in a row before a TPU counts as broken
name="" zone="" project="" type="" version="" slices=1 spot="" reserved="" direct="" keep=""
gcloud_create=() gcloud_ssh=()

check() { # ACTION
  case $1 in
    train | up | run | logs | status | stop | down) ;;
    *) fail 2 "'$1' found; an action was wanted." "Use train, up, run, logs, status, stop or down." ;;
  esac
  [ "$name" ] || fail 2 "--name: nothing found; the name of a TPU was wanted." "Choose one: it is how you find it."
  [ "$zone" ] || fail 2 "--zone: nothing found; a zone was wanted." "Name one that has the type, such as us-west4-a."
  [[ $slices =~ ^[1-9][0-9]*$ ]] || fail 2 "--slices: '$slices' found; a positive integer was wanted." "Correct it."
  [ -z "$spot" ] || [ -z "$reserved" ] || fail 2 "--spot and --reserved found; one was wanted." "Leave one out."
  [ -z "$direct" ] || [ "$slices" = 1 ] ||
    fail 2 "--slices $slices found with --direct; 1 was wanted." "Several slices come from the queue: drop --direct."
  case $1 in train | up) check_type ;; esac
  case $1 in
    train | run)
      need_arguments
      check_sent
      ;;
    *) [ ${#arguments[@]} = 0 ] || fail 2 "'${arguments[0]}' found after --; $1 takes none." "Only train and run do." ;;
  esac
  [ "$1" != train ] || check_workdir
}

check_type() {
  [ "$type" ] || fail 2 "--type: nothing found; an accelerator type was wanted." "For example --type v5litepod-16."
  [ -z "$version" ] || return 0
  case $type in
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    v[234]-*) version=tpu-ubuntu2204-base ;;
    *) fail 2 "--type: '$type' found; v2 to v4, v5litepod, v5p or v6e was wanted." "Name its --version for another." ;;
  esac
}

check_workdir() { # it must outlive the TPU VM: a preemption takes the disk along, and so does `down`
  case $(argument --workdir) in gs://?* | /*) ;; *)
    fail 2 "--workdir: '$(argument --workdir)' found, on a disk that goes with the TPU VM; gs://BUCKET/DIRECTORY was wanted." \
      "Name one, or a path on a file server that every worker mounts."
    ;;
  esac
}

tpu() { # run|ask VERB [FLAGS]: on the queued resource, or the TPU VM
  "$1" gcloud compute tpus "$group" "$2" "$name" "${place[@]}" "${@:3}" --quiet
}

create() {
  local flags=("--accelerator-type=$type")
  if [ "$direct" ]; then
    flags+=("--version=$version")
  else
    flags+=("--runtime-version=$version")
    if [ "$slices" = 1 ]; then
      flags+=("--node-id=$name")
    else
      flags+=("--node-count=$slices" "--node-prefix=$name")
    fi
  fi
  [ -z "$spot" ] || flags+=(--spot)
  [ -z "$reserved" ] || flags+=(--reserved)
  [ ${#gcloud_create[@]} = 0 ] || flags+=("${gcloud_create[@]}")
  tpu run create "${flags[@]}"
}

delete() { if [ "$direct" ]; then tpu run delete; else tpu run delete --force; fi; } # --force: its TPU VMs too

state() { # the state that the API names, or ABSENT
  local said
  if said=$(tpu ask describe "--format=value($state_field)" 2>&1); then
    if [ -z "$dry_run" ]; then tail -n 1 <<<"$said"; elif [ "$created" ]; then echo ACTIVE; else echo ABSENT; fi
  elif [[ $said == *NOT_FOUND* ]]; then
    echo ABSENT
  else
    echo "$said" >&2
    return 1
  fi
}

up() { # [patient]: what the API refuses, or does not answer, is asked again
  local now before="" pause
  created=""
  while true; do
    pause=""
    now=$(state) || now=UNKNOWN
    [ "$now" = "$before" ] || say "$name is $now"
    before=$now
    case $now in
      ACTIVE | READY) return ;;
      ABSENT) if create; then created=yes; else pause=refused; fi ;;
      FAILED)
        [ -z "$created" ] || [ "${1-}" ] || # this very request has
          fail 1 "$name: the request failed: $(tpu ask describe "--format=value(state.failedData.error.message)")" \
            "Change the request, or wait for capacity; launch/tpu.sh down deletes it."
        delete || pause=refused
        [ -z "$created" ] || pause=refused # and is made again, though not at once
        ;;
      SUSPENDED | PREEMPTED | TERMINATED) delete || pause=refused ;;
      STOPPED) fail 1 "$name is stopped." "Start it: gcloud compute tpus tpu-vm start $name --zone=$zone" ;;
      UNKNOWN) pause=refused ;;
      *) pause=waiting ;;
    esac
    [ "$pause" != refused ] || [ "${1-}" ] || fail 1 "$name could not be made ready." "gcloud says why above."
    [ -z "$pause" ] || sleep "$poll"
  done
}

on_workers() { # SHELL [FILE]
  local flags=(--worker=all) shell=$1
  [ "$direct" ] || flags+=(--node=all --batch-size=all)
  [ ${#gcloud_ssh[@]} = 0 ] || flags+=("${gcloud_ssh[@]}")
  if [ "${2-}" ]; then
    run gcloud compute tpus "$group" scp "$2" "$name:rcgrpo.tar.gz" "${place[@]}" "${flags[@]}" --quiet || return
    shell="{ $shell; } < rcgrpo.tar.gz"
  fi
  # A preempted VM leaves a connection without an end: ask for signs of life.
  flags+=(--ssh-flag=-oConnectTimeout=15 --ssh-flag=-oServerAliveInterval=30)
  tpu run ssh "${flags[@]}" "--command=$shell"
}

# A TPU that has worked and cannot be reached any more is made again. One that answers, or never has, is left alone: the
# fault is elsewhere, and a new one would have it too.
replace() {
  ! on_workers true ||
    fail 1 "$name can be reached, but rcgrpo cannot be started there." \
      "gcloud says why above. The TPU is still there, and costs: train again, or down."
  [ "$reached" ] ||
    fail 1 "$name cannot be reached." \
      "See to ssh first (keys, firewall, --gcloud-ssh). The TPU is still there, and costs: train again, or down."
  delete || true
  reached=""
}

train() {
  local lost=0 result again="" reached=""
  trap 'say "$name is left as it is; the same command goes on from here, down deletes it"; exit 130' INT
  pack
  while true; do
    up "$again"
    again=patient
    result=lost
    if start; then
      reached=yes
      on_workers "$(far follow)" || true # how it went is asked for
      result=$(outcome)
    fi
    [ "$result" = lost ] || lost=0
    case $result in
      0) break ;;
      running) say "the connection to $name was lost; rcgrpo goes on" ;;
      stopped) say "rcgrpo was stopped on $name" ;;
      lost)
        lost=$((lost + 1))
        say "no answer from $name ($lost of $tries)"
        if [ "$lost" = "$tries" ]; then
          replace
          lost=0
        fi
        ;;
      *)
        say "rcgrpo failed with exit status $result; $name is still there, and costs: run again, or down"
        exit "$result"
        ;;
    esac
    sleep "$poll"
  done
  [ "$keep" ] || delete
}

logs() {
  local result
  on_workers "$(far follow)" || true
  result=$(outcome)
  case $result in
    stopped) exit 143 ;;
    lost | running) fail 1 "$name: the connection was lost." "The same command follows again." ;;
    *) exit "$result" ;;
  esac
}

case ${1-} in
  "" | -h | --help | help)
    usage
    [ $# -gt 0 ] || exit 2
    exit
    ;;
esac
parse "name|zone|project|type|version|slices" "env|gcloud-create|gcloud-ssh" "spot|reserved|direct|keep" \
  "what rcgrpo gets follows --" "${@:2}"
check "$1"
if [ "$direct" ]; then group=tpu-vm state_field=state; else group=queued-resources state_field=state.state; fi
place=("--zone=$zone")
[ -z "$project" ] || place+=("--project=$project")
created=""

case $1 in
  run)
    pack
    start
    ;;
  status)
    [ -z "$dry_run" ] || created=yes # as if it were there: the commands are wanted
    now=$(state) || fail 1 "$name: its state cannot be told." "gcloud says why above."
    say "$name is $now"
    case $now in ACTIVE | READY) on_workers "$(far status)" ;; esac
    ;;
  stop) on_workers "$(far stop)" ;;
  down) delete ;;
  *) "$1" ;;
esac
