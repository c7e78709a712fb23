# shellcheck shell=bash
# Sourced by the other scripts: finds or makes a Python that has what requirements.txt asks for.
# Sets ROOT (the repository) and PYTHON. An active conda or virtual environment that satisfies the
# requirements is used as it is; otherwise a .venv is made in the repository, once.

ROOT="$(CDPATH='' cd -- "$(dirname -- "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)"

fail() { # WORD ...: ends the script with a line of them
    echo "$*" >&2
    exit 2
}

explain() { # ARGUMENT ...: with --help, prints the comment at the head of the script, and ends
    local argument
    for argument in "$@"; do
        [[ "$argument" != -- ]] || return 0
        if [[ "$argument" == -h || "$argument" == --help ]]; then
            sed -n '1d; /^#/!q; s/^# \?//p' "$0"
            exit 0
        fi
    done
}

read_config() { # NAME=DEFAULT ...: sets each as the environment, else config.sh, else the default
    local config complaint setting name value settings=("$@")
    local -A given=()
    for setting in "$@"; do
        name="${setting%%=*}"
        given[$name]="${!name:-}"
    done
    # As an editor of Windows may have written it.
    config="$(LC_ALL=C sed '1s/^\xef\xbb\xbf//; s/\r$//' "$ROOT/config.sh")"
    config+=$'\ntrue' # a last line like [[ -d /x ]] && IPC=50 may be false
    if ! complaint="$(bash -euc "$config" config.sh 2>&1 > /dev/null)"; then
        complaint="${complaint%%$'\n'*}"
        fail "${complaint:-config.sh: a command in it failed}; it must be lines of NAME=value," \
            "without spaces around the ="
    fi
    # What the environment could not override, or would be set in this function alone, is exported.
    exported() { for setting in "$@"; do [[ "$setting" == -* ]] || export "${setting?}"; done; }
    readonly() { exported "$@"; }
    declare() { exported "$@"; }
    typeset() { exported "$@"; }
    eval "$config"
    unset -f readonly declare typeset
    for setting in "${settings[@]}"; do
        name="${setting%%=*}"
        value="${given[$name]:-${!name:-${setting#*=}}}"
        printf -v "$name" %s "${value/#\~\//${HOME:-}/}" # ~/ within quotes
    done
}

use_environment() { # REQUIREMENTS: sets PYTHON
    local requirements="$ROOT/$1" python
    python="$(command -v python3)" || python=""
    for PYTHON in "$python" "$ROOT/.venv/bin/python"; do
        [[ ! -x "$PYTHON" ]] ||
            ! "$PYTHON" "$ROOT/scripts/check_requirements.py" "$requirements" 2> /dev/null || return 0
    done
    [[ -n "$python" ]] || fail "setup: python3 is not installed; install Python 3.10 or newer"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "setup: $("$python" --version) is too old; install Python 3.10 or newer"
    echo "setup: installing $1 into $ROOT/.venv (about 6 GB and a few minutes, once)"
    [[ -x "$PYTHON" ]] || "$python" -m venv "$ROOT/.venv" ||
        fail "setup: cannot make a virtual environment; install the venv module of Python" \
            "(Debian: apt-get install python3-venv), or activate a conda environment"
    "$PYTHON" -m pip install --disable-pip-version-check -r "$requirements" ||
        fail "setup: pip could not install $1 (its reason is above); the same command again continues"
}
