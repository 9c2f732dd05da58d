#!/usr/bin/env bash
# Puts into a folder what launch/gpu_measure.sh wants on a machine without a network: this
# package as a wheel and those it needs beside JAX's (PyTorch's compiler: setuptools), for
# that machine's Python; CIFAR in pieces below 20 MB, from the data directory of
# tensorflow-datasets; and with --before=COMMIT another version of the package to compare
# with, dc80837 or newer.
# launch/gpu_bundle.sh --bundle=DIR [--data-dir=DIR] [--data=NAMES] [--python=3.12]
# [--packages=NAMES] [--before=COMMIT]
set -euo pipefail
cd "$(dirname "$0")/.."

bundle=bundle data_dir="" before="" version=3.12
data="cifar10 cifar100"
packages="ml-collections safetensors matplotlib contourpy cycler fonttools kiwisolver
  packaging pillow pyparsing python-dateutil setuptools six"
for option in "$@"; do
  case $option in
    --bundle=*) bundle=${option#*=} ;;
    --data-dir=*) data_dir=${option#*=} ;;
    --data=*) data=${option#*=} ;;
    --python=*) version=${option#*=} ;;
    --packages=*) packages=${option#*=} ;;
    --before=*) before=${option#*=} ;;
    *)
      echo "Expected an option of those in the head of $0, got $option." >&2
      exit 2
      ;;
  esac
done
python=${PYTHON:-.venv/bin/python}

mkdir -p "$bundle/wheels"
rm -f "$bundle"/wheels/*.whl
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$bundle/wheels" .
# shellcheck disable=SC2086 # several
"$python" -m pip download --quiet --no-deps --only-binary=:all: --dest "$bundle/wheels" \
  --implementation cp --python-version "$version" --platform manylinux_2_28_x86_64 \
  --platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64 \
  --platform manylinux2014_x86_64 --platform any $packages

if [ -n "$before" ]; then
  rm -rf "$bundle/before"
  mkdir "$bundle/before"
  git archive "$before" samrobust configs | tar -x -C "$bundle/before"
  git rev-parse --verify "$before^{commit}" >"$bundle/before/COMMIT"
  # Whether it has what is timed of it.
  PYTHONPATH="$bundle/before" "$python" -P launch/gpu_measure/epochs.py \
    --help >/dev/null
fi

for name in $data; do
  [ -e "$bundle/data/$name/files.txt" ] ||
    "$python" -m launch.gpu_measure.pieces pack "$name" "$bundle/data/$name" \
      ${data_dir:+"$data_dir"}
done
du -sh "$bundle"/*
