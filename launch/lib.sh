# shellcheck shell=bash
# Sourced by the other scripts: flags, errors, dry runs, and one `rcgrpo` command on many workers.
# Who sources it sets the variables and, to use workers, defines
#   on_workers SHELL [FILE] runs a shell command on every worker at once, with FILE as its input; fails if one does

dry_run=""     # not empty: commands are printed and not run
extra=""       # of the package, to install on a worker: tpu or cuda
arguments=()   # of rcgrpo
env=()         # NAME=VALUE of rcgrpo
archive=""     # the code, once `pack` has made it
exec 3>&1      # so that a dry run also prints what is captured by $(...)

fail() { # EXIT_CODE PROBLEM REMEDY
  printf 'launch/%s: error: %s\n  %s\n' "${0##*/}" "$2" "$3" >&2
  exit "$1"
}

say() { printf 'launch/%s: %s\n' "${0##*/}" "$1" >&2; }

usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "launch/${0##*/}"; } # the comment at the top of the script

quote() { # WORDS -> one line that any POSIX shell reads as these words
  local word line=""
  for word in "$@"; do
    case $word in "" | *[!A-Za-z0-9_./:=,@%+-]*) word=\'${word//\'/\'\\\'\'}\' ;; esac
    line+=" $word"
  done
  printf '%s\n' "${line# }"
}

show() { # prints a command that is about to run, or that would in a dry run
  if [ "$dry_run" ]; then quote "$@" >&3; else echo "+ $(quote "$@")" >&2; fi
}

run() {
  show "$@"
  [ "$dry_run" ] || "$@" 3>&-
}

ask() { # like run, for what is asked again and again: shown in a dry run only
  if [ "$dry_run" ]; then show "$@"; else "$@" 3>&-; fi
}

need_value() { # the arguments left, from a flag on; a value that looks like a flag has been forgotten
  { [ $# -ge 2 ] && [[ -n $2 && $2 != --* ]]; } ||
    fail 2 "$1: '${2-}' found; a value was wanted." "Write $1 VALUE or $1=VALUE; --help lists the flags."
}

# Reads flags, each into the variable of its name with _ for -; names are joined by |. `word`, where a script has it, gets
# what is no flag.
parse() { # NAMES_WITH_A_VALUE NAMES_THAT_MAY_BE_REPEATED NAMES_WITHOUT_VALUE HOW_ARGUMENTS_FOLLOW ARGUMENTS
  local single=$1 repeated=$2 switches=$3 follow=$4 into given=" " # no flag has these names
  shift 4
  while [ $# -gt 0 ]; do
    [[ $1 != --?*=* ]] || set -- "${1%%=*}" "${1#*=}" "${@:2}"
    into=${1#--}
    into=${into//-/_}
    if [ "$1" = -- ] && [ "$follow" ]; then
      arguments=("${@:2}")
      return
    elif [ "$into" ] && [[ $1 =~ ^--($single)$ ]]; then
      need_value "$@"
      [[ $given != *" $1 "* ]] || fail 2 "$1: given twice; one value was wanted." "Leave one of them out."
      given+="$1 "
      printf -v "$into" %s "$2"
      shift
    elif [ "$into" ] && [[ $1 =~ ^--($repeated)$ ]]; then
      [ $# -ge 2 ] || need_value "$@"
      eval "$into+=(\"\$2\")"
      shift
    elif [ "$into" ] && [[ $1 =~ ^--(dry-run|$switches)$ ]]; then
      printf -v "$into" yes
    elif [ "$1" = -h ] || [ "$1" = --help ]; then
      usage
      exit
    elif [[ $1 != -* ]] && declare -F word >/dev/null; then
      word "$1"
    else
      fail 2 "'$1' found; a flag was wanted." "launch/${0##*/} --help lists them${follow:+; $follow}."
    fi
    shift
  done
}

need_arguments() {
  [ ${#arguments[@]} -gt 0 ] ||
    fail 2 "nothing found after --; the arguments of rcgrpo were wanted." \
      "For example: -- train --config configs/kontext_512.py --workdir DIRECTORY"
}

# FLAG -> its value among the arguments of rcgrpo
argument() {
  local word before="" found=""
  for word in "${arguments[@]}"; do
    [ "$before" != "$1" ] || found=$word
    case $word in "$1"=*) found=${word#*=} ;; esac
    before=$word
  done
  echo "$found"
}

# What would end the command on the workers only: a variable with no name, a configuration that does not arrive there.
check_sent() {
  local variable config
  for variable in ${env[@]+"${env[@]}"}; do
    [[ $variable =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] ||
      fail 2 "--env: '$variable' found; NAME=VALUE was wanted." "Names have letters, digits and _, no digit first."
  done
  config=$(argument --config)
  case $config in "" | /* | *://*) return ;; esac
  [ -f "${config%%:*}" ] || fail 2 "--config: '$config' found, which is no file of this checkout." "Correct the path."
  ! git check-ignore --quiet "${config%%:*}" ||
    fail 2 "--config: '$config' found, which git ignores: it would not be sent." "Keep it where git sees it."
}

# Makes $archive: the working tree as git sees it, changed and new files too, ignored ones not.
pack() {
  local directory="${TMPDIR:-/tmp}/rcgrpo" index tree
  git rev-parse --is-inside-work-tree >/dev/null 2>&1 ||
    fail 1 "$PWD is no git checkout; what git knows is what is sent." "Clone the repository and launch from there."
  if [ -z "$dry_run" ]; then
    directory=$(mktemp -d)
    # shellcheck disable=SC2064 # now: the variable is local
    trap "rm -rf '$directory'" EXIT
  fi
  index=$directory/index archive=$directory/code.tar.gz
  run env GIT_INDEX_FILE="$index" git add --all
  tree=$(run env GIT_INDEX_FILE="$index" git write-tree)
  run git archive --format=tar.gz --output="$archive" "${tree:-TREE}"
}

# On a worker everything is in a directory of the host's own: several hosts may share a home.
# shellcheck disable=SC2016 # the far shell's
far_directory='rcgrpo/"$(hostname)"'
worker="bash code/launch/lib_worker.sh"

far() { echo "cd $far_directory && $worker $1"; } # VERB -> the shell command that runs it on a worker

# Sends what `pack` made and starts the command on every worker; a worker that runs it already is left alone. Fails
# where a worker is not reached, and ends the script where one is busy with something else.
start() {
  local command="mkdir -p $far_directory/code && cd $far_directory" said
  # The lock is held as long as a command runs, and code in use is not replaced.
  # Modules that are gone must not stay importable; all else that lies there may be a user's.
  command+=" && flock --nonblock --conflict-exit-code 0 lock sh -c 'rm -rf code/rcgrpo_jax && tar -xz -C code'"
  [ ${#env[@]} = 0 ] || command+=" && export $(quote "${env[@]}")"
  command+=" && $worker start $extra $(quote "${arguments[@]}")"
  said=$(on_workers "$command" "$archive") || return
  case $said in *"rcgrpo: busy "*)
    fail 1 "a worker runs another command: $(sed -n 's/^rcgrpo: busy //p' <<<"$said" | head -n 1)" \
      "Let it end, or stop it first: launch/${0##*/} stop."
    ;;
  esac
}

# How the command stands on all workers: its exit status once it has ended everywhere or failed anywhere, or
#   stopped   a worker was told to stop, or lost it: the same command goes on from its last checkpoint
#   running   it goes on
#   lost      a worker is not reached, or has never started it
outcome() {
  local said
  if ! said=$(on_workers "$(far status)"); then
    echo lost
  elif [ "$dry_run" ]; then
    echo 0
  else
    case $'\n'$said in
      *"rcgrpo: exit 143"* | *"rcgrpo: killed"*) echo stopped ;;
      *"rcgrpo: exit "[1-9]*) sed -n 's/^rcgrpo: exit \([1-9][0-9]*\).*/\1/p' <<<"$said" | head -n 1 ;;
      *"rcgrpo: running"*) echo running ;;
      *"rcgrpo: exit 0"*) echo 0 ;;
      *) echo lost ;;
    esac
  fi
}
