#!/bin/sh
# Makes Python for aarch64 in a folder, with which `qemu-aarch64 -L FOLDER FOLDER/usr/bin/python3.11`
# runs this package and its tests: Debian's Python, the wheels that are needed, and in FOLDER/package
# what the cross compiler makes of the sources.
#
#     tests/aarch64.sh PYTHON FOLDER REQUIREMENT ...
set -e
python=$1 folder=$2
shift 2
for program in debootstrap dpkg-deb aarch64-linux-gnu-gcc qemu-aarch64; do
    command -v $program > /dev/null || { echo "$program is missing"; exit 1; }
done

if [ ! -e "$folder/done" ]; then
    rm -rf "$folder"
    debootstrap --arch=arm64 --foreign --variant=minbase --include=python3-dev,libstdc++6 \
        bookworm "$folder" > /dev/null
    for package in "$folder"/var/cache/apt/archives/*.deb; do dpkg-deb -x "$package" "$folder"; done
    $python -m pip install -q --target "$folder/site" --python-version 3.11 --only-binary=:all: \
        --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 \
        --platform manylinux2014_aarch64 "$@"
    touch "$folder/done"
fi

# Python's own description of that platform tells setup.py what to compile for; this Python runs it.
mkdir -p "$folder/description"
cp "$folder"/usr/lib/python3.11/_sysconfigdata__aarch64-linux-gnu.py "$folder/description"
export _PYTHON_HOST_PLATFORM=linux-aarch64 PYTHONPATH="$folder/description"
export _PYTHON_SYSCONFIGDATA_NAME=_sysconfigdata__aarch64-linux-gnu
CC="aarch64-linux-gnu-gcc -I$folder/usr/include/python3.11 -I$folder/usr/include" \
    LDSHARED="aarch64-linux-gnu-gcc -shared" \
    $python setup.py -q build --build-base "$folder/build" --build-lib "$folder/package"
