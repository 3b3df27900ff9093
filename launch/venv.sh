# shellcheck shell=bash
# Sourced by the other scripts: makes a virtual environment that works on a bare Debian.
# Usage: make_venv DIRECTORY
#        install_packages NAME ...

install_packages() { # of Debian
  local sudo=""
  [ "$(id -u)" = 0 ] || sudo="sudo"
  $sudo apt-get update -qq && $sudo apt-get install -y -qq "$@"
}

make_venv() {
  local directory=$1 python=${PYTHON:-python3}
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "launch: $("$python" --version) found; Python 3.11 or newer is wanted. Set PYTHON to it." >&2
    return 1
  fi
  if [ ! -x "$directory/bin/pip" ]; then
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
      install_packages python3-venv # Debian packs ensurepip apart from python3.
    fi
    "$python" -m venv "$directory"
  fi
  "$directory/bin/pip" install --quiet --disable-pip-version-check --upgrade pip
}
