#!/usr/bin/env bash
# Build a source distribution in each of some Pythons, and run the tests on what that installs.
#
#   tests/in_pythons.sh SDIST FOLDER PYTHON...
#
# A Python is a name like python3.13t, looked for on the PATH and among those of pyenv and uv. One
# that is not there is left out, and so is one for which the packages that ours cannot do without
# have no wheels; others without wheels are left out alone. All this is told in the end.
# With BOUNDS=FILE, versions that must be the ones installed, nothing may be left out; what they use
# is newer, and may warn of names that it no longer has.
# TESTS has arguments for pytest.
set -euo pipefail
sdist=$(realpath "$1")
folder=$2
shift 2

find_python() {
    local place
    for place in "$(command -v "$1")" ~/.pyenv/versions/*/bin/"$1" \
        ~/.local/share/uv/python/*/bin/"$1"; do
        # What pyenv puts on the PATH may stand for a Python that is not in use.
        if "$place" -c 'import ensurepip' 2> /dev/null; then
            echo "$place"
            return
        fi
    done
    return 1
}

needs() {
    "$python" -c 'import sys, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
print(*project["dependencies"] if sys.argv[1] == "core" else
      project["optional-dependencies"][sys.argv[1]], sep="\n")' "$1"
}

# Builds are isolated: older versions of pip take the first of these for them, newer ones the second.
if [ -n "${BOUNDS:-}" ]; then
    PIP_CONSTRAINT=$(realpath "$BOUNDS")
    export PIP_CONSTRAINT PIP_BUILD_CONSTRAINT=$PIP_CONSTRAINT
fi
export PIP_ONLY_BINARY=:all: PIP_DISABLE_PIP_VERSION_CHECK=1

told=() tested=0 failed=0
for name in "$@"; do
    if ! python=$(find_python "$name"); then
        told+=("$name: skipped, it is not here")
        continue
    fi
    version=$("$python" -c 'import platform; print(platform.python_version())')
    echo "--- $name is $python, $version"
    place=$folder/$name
    rm -rf "$place"
    "$python" -m venv "$place/venv"
    pip=("$place/venv/bin/python" -m pip install -q)
    cp -r tests benchmarks tools pyproject.toml "$place"

    without=
    if ! mapfile -t packages < <(needs core) || ! "${pip[@]}" "${packages[@]}"; then
        told+=("$name $version: skipped, not all it needs has wheels")
        [ -z "${BOUNDS:-}" ] || failed=1
        continue
    fi
    mapfile -t packages < <(needs test)
    if ! "${pip[@]}" "${packages[@]}"; then
        [ -z "${BOUNDS:-}" ] || exit 1
        for package in "${packages[@]}"; do
            "${pip[@]}" "$package" || without+=" ${package%%[<>=]*}"
        done
    fi
    "${pip[@]}" "$sdist"

    tested=$((tested + 1))
    result=passed
    # A free-threaded Python stays so, whatever is imported.
    (cd "$place" && PYTHON_GIL=$([[ $name == *t ]] && echo 0) \
        venv/bin/python -m pytest ${BOUNDS:+-W ignore::DeprecationWarning} ${TESTS:-}) || result=FAILED failed=1
    told+=("$name $version: $result${without:+, without$without}")
done

printf '%s\n' "${told[@]}"
[ $tested -gt 0 ] && exit $failed
