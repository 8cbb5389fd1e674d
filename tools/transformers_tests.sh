#!/usr/bin/env bash
# Prints the folder of the tests of the installed version of Transformers, which are part of its source distribution
# but not of its wheel. They are downloaded once, into build/. Exit code 1 if they cannot be downloaded.
set -euo pipefail
cd "$(dirname "$0")/.."

version=$(python -c "from importlib.metadata import version; print(version('transformers'))")
source=build/transformers-$version
if [ ! -f "$source/tests/test_modeling_common.py" ]; then
    mkdir -p build
    python -m pip download --quiet --no-deps --no-binary transformers --dest build "transformers==$version" >&2
    tar -xzf "$source.tar.gz" -C build "transformers-$version/tests"
    rm "$source.tar.gz"
fi
echo "$PWD/$source/tests"
