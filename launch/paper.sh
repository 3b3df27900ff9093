#!/usr/bin/env bash
# The paper's experiment, from downloaded data to its Tables 1 to 3 and Fig. 5; docs/paper.md says what it costs.
# The same command goes on where it was stopped.
#
# usage: launch/paper.sh --model MODEL --data DATA --judge URL[,URL] --out OUT [FLAGS] [-- FIELDS OF THE RUNS]
#
# flags:
#   --model MODEL         the editor: a converted directory, or a diffusers folder
#   --data DATA           folder with compbench/, and with what is trained on, as they were downloaded
#   --judge URL,...       servers of EditScore, as launch/editscore.sh prints them
#   --out OUT             directory of the data sets as they are read, runs, LoRAs, edits and tables
#   --train NAME          what is trained on: a data set of `rcgrpo data prepare` in DATA, or any data.path
#                         (default: humanedit; the paper does not say)
#   --config FILE[:NAME]  of the runs (default: configs/kontext_512_paper.py)
#   --topology NAME       have `rcgrpo plan` say first whether the runs fit, for example h100:8
#   --clip MODEL          CLIP of LC-I and LC-T, none to leave them out (default: openai/clip-vit-large-patch14)
#   --lpips-squeeze FILE  weights of LPIPS as CompBench has it; docs/compbench.md says how to make the file
#   --size WxH            pixels in which the edits of the tables are made (default: 512x512)
#   --steps N             solver steps of these edits (default: 28)
#   --batches N           batches of groups of Fig. 5 (default: 20)
#   --dry-run             print every command and run none
#
# What follows -- goes to every run, such as --config.train.num_steps=100. Paths that do not begin with / are from the
# root of this checkout.

set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/lib.sh
. launch/lib.sh

model="" data="" judge="" out="" train=humanedit config=configs/kontext_512_paper.py topology=""
clip=openai/clip-vit-large-patch14 lpips_squeeze="" size=512x512 steps=28 batches=20
rcgrpo=rcgrpo
[ ! -x .venv/bin/rcgrpo ] || rcgrpo=.venv/bin/rcgrpo

# What each variant changes in the configuration, which has the paper's 0.9 and 1.1.
variants=(global rdp rdp-acd tau-1.0-1.0 tau-0.8-1.2 tau-1.2-0.8)
changes() { # VARIANT
  case $1 in
    global) echo --config.explore.kind=global --config.acd.weight=0 ;;
    rdp) echo --config.explore.kind=region --config.acd.weight=0 ;;
    rdp-acd) echo --config.explore.kind=region ;;
    tau-*)
      IFS=- read -r _ edit base <<<"$1"
      echo --config.explore.kind=region "--config.surrogate.tau_edit=$edit" "--config.surrogate.tau_base=$base"
      ;;
  esac
}

check() {
  local name missing=""
  for name in model data judge out; do
    [ -n "${!name}" ] || missing+=" --$name"
  done
  [ -z "$missing" ] || fail 2 "missing$missing." "launch/paper.sh --help says what they are."
  for name in steps batches; do
    [[ ${!name} =~ ^[1-9][0-9]*$ ]] || fail 2 "--$name: '${!name}' found; a positive integer was wanted." "Correct it."
  done
  # What is wanted after days of training alone.
  [[ $size =~ ^[1-9][0-9]*x[1-9][0-9]*$ ]] ||
    fail 2 "--size: '$size' found; WIDTHxHEIGHT in pixels was wanted." "For example --size 512x512."
  [ "$dry_run" ] || [ -z "$lpips_squeeze" ] || [ -f "$lpips_squeeze" ] ||
    fail 1 "--lpips-squeeze: no file $lpips_squeeze found." "docs/compbench.md says how to make it."
  [ "$dry_run" ] || command -v "$rcgrpo" >/dev/null ||
    fail 1 "no rcgrpo found." "Install the package: pip install -e '.[data,evaluate,cuda]', or tpu for cuda."
  if [ -z "$dry_run" ] && [ ! -d "$data/compbench" ]; then
    fail 1 "--data: no folder $data/compbench found." "docs/compbench.md says where CompBench is to be had."
  fi
}

# Like run; the command gets a signal that this script gets, so that it saves and ends, and this script with it.
relay() {
  local child code=0
  show "$@"
  [ -z "$dry_run" ] || return 0
  "$@" 3>&- &
  child=$!
  trap 'kill -TERM "$child" 2>/dev/null || true' TERM INT
  wait "$child" || code=$?
  while kill -0 "$child" 2>/dev/null; do # a signal ends `wait` before the child ends
    code=0
    wait "$child" || code=$?
  done
  trap - TERM INT
  [ "$code" != 143 ] || say "stopped; the same command goes on"
  [ "$code" = 0 ] || exit "$code"
}

prepare() { # NAME -> made into OUT/data/NAME
  relay "$rcgrpo" data prepare "$1" --from "$data/$1" --out "$out/data/$1"
}

# Tells the data of the runs, and makes them where they are a published set.
training_data() {
  case $train in
    *:* | */*) trained_on=$train ;;
    *)
      prepare "$train"
      trained_on=tfds:$out/data/$train
      ;;
  esac
}

fields() { # VARIANT -> the flags of its run, in `flags`
  read -ra flags <<<"$(changes "$1")"
  flags=(
    --config "$config" "--config.model.path=$model" "--config.data.path=$trained_on"
    "--config.reward_options.editscore.urls=$judge" "--config.data.cache=$out/cache" "${flags[@]}" ${arguments[@]+"${arguments[@]}"}
  )
}

learn() { # VARIANT
  local flags
  fields "$1"
  relay "$rcgrpo" train "${flags[@]}" --workdir "$out/runs/$1"
  relay "$rcgrpo" export --workdir "$out/runs/$1" --out "$out/loras/$1"
}

tabulate() { # TABLE VARIANTS
  local variant flags=()
  for variant in "${@:2}"; do flags+=(--adapter "$variant=$out/loras/$variant"); done
  [ -z "$lpips_squeeze" ] || flags+=(--lpips_squeeze "$lpips_squeeze")
  [ "$clip" = none ] || flags+=(--clip "$clip")
  relay "$rcgrpo" evaluate --benchmark compbench --published "$1" --data "tfds:$out/data/compbench" --model "$model" \
    --edits "$out/edits" --out "$out/$1" --size "$size" --steps "$steps" "${flags[@]}"
}

explore() { # Fig. 5: the untrained editor under both perturbations, judged by the task reward alone
  local flags
  fields rdp
  relay "$rcgrpo" ablate "${flags[@]}" --seeds 0 --batches "$batches" --out "$out/fig-5" --data "tfds:$out/data/compbench" \
    --variant 'global: explore.kind=global' --variant 'RDP: explore.kind=region'
}

main() {
  parse "model|data|judge|out|train|config|topology|clip|lpips-squeeze|size|steps|batches" "" "" "fields of the runs follow --" "$@"
  check
  trained_on=""
  if [ -z "$dry_run" ]; then
    mkdir -p -- "$out" || fail 1 "--out: $out cannot be made." "Choose a folder you can write to."
    out=$(cd -- "$out" && pwd)
  fi
  export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$out/compiled} # the runs share their programs
  prepare compbench
  training_data
  if [ -n "$topology" ]; then
    fields rdp-acd
    relay "$rcgrpo" plan "${flags[@]}" --topology "$topology"
  fi
  for variant in "${variants[@]}"; do learn "$variant"; done
  tabulate table-1 rdp-acd
  tabulate table-2 global rdp rdp-acd
  tabulate table-3 tau-1.0-1.0 rdp-acd tau-0.8-1.2 tau-1.2-0.8
  explore
  [ "$dry_run" ] || sed '' "$out"/table-{1,2,3}/table.md "$out/fig-5/groups.md"
}

{ # read as a whole: the file may change in the days that it runs
  main "$@"
  exit
}
