# shellcheck shell=bash
# Sourced by the other scripts: finds or makes a Python that has what requirements.txt asks for.
# Sets ROOT (the repository) and PYTHON. An active conda or virtual environment that satisfies the
# requirements is used as it is; otherwise a .venv is made in the repository, once.

ROOT="$(CDPATH='' cd -- "$(dirname -- "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)"

explain() { # ARGUMENT ...: with --help, prints the comment at the head of the script, and ends
    local argument
    for argument in "$@"; do
        case "$argument" in
            --) return ;;
            -h | --help)
                sed -n '2,/^\([^#]\|$\)/ { /^#\( \|$\)/ s/^# \{0,1\}//p }' "$0"
                exit 0
                ;;
        esac
    done
}

read_config() { # reads config.sh, whatever editor wrote it; one line and 2 where that fails
    local config line complaint
    config="$(tr -d '\r' < "$ROOT/config.sh")"       # as an editor of Windows may have written it
    config="${config#$'\xef\xbb\xbf'}"$'\ntrue' # a last line like [[ -d /x ]] && IPC=50 may be false
    # What the environment could not override, or what would be set in this function alone.
    line="$(sed -nE '/^([^#]*[;&|])?[[:space:]]*(readonly|declare|typeset)[[:space:]]/ { =; q }' \
        <<< "$config")"
    if [[ -n "$line" ]]; then
        complaint="config.sh: line $line: readonly, declare or typeset"
    elif complaint="$(bash -euc "$config" config.sh 2>&1 >/dev/null)"; then
        complaint=""
    else
        complaint="${complaint%%$'\n'*}" complaint="${complaint:-config.sh: a command in it failed}"
    fi
    if [[ -n "$complaint" ]]; then
        echo "$complaint; it must be lines of NAME=value, without spaces around the =" >&2
        return 2
    fi
    eval "$config"
}

satisfies() { # PYTHON REQUIREMENTS: whether every requirement is installed in a version it allows
    "$1" "$ROOT/scripts/check_requirements.py" "$2" >/dev/null 2>&1
}

use_environment() { # REQUIREMENTS: sets PYTHON
    local requirements="$ROOT/$1" python
    if python="$(command -v python3)" && satisfies "$python" "$requirements"; then
        PYTHON="$python"
        return
    fi
    PYTHON="$ROOT/.venv/bin/python"
    if [[ -x "$PYTHON" ]] && satisfies "$PYTHON" "$requirements"; then
        return
    fi
    if [[ -z "${python:-}" ]]; then
        echo "setup: python3 is not installed; install Python 3.10 or newer" >&2
        return 2
    fi
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "setup: $("$python" --version) is too old; install Python 3.10 or newer" >&2
        return 2
    fi
    echo "setup: installing $1 into $ROOT/.venv (about 6 GB and a few minutes, once)"
    if [[ ! -x "$PYTHON" ]] && ! "$python" -m venv "$ROOT/.venv"; then
        echo "setup: cannot make a virtual environment; install the venv module of Python" \
            "(Debian: apt-get install python3-venv), or activate a conda environment" >&2
        return 2
    fi
    if ! "$PYTHON" -m pip install --disable-pip-version-check -r "$requirements"; then
        echo "setup: pip could not install $1 (its reason is above); the same command again" \
            "continues" >&2
        return 2
    fi
}
