#!/bin/sh
# Fetches the pictures and words that nano is trained on: four pinned npm packages.
#
#   sh src/train/fetch-data.sh [DIR]        (DIR: data)
#
# Each package is fetched by `npm pack` from the registry that npm is configured for, and unpacked to
# DIR/<name>-<version>. What is already there is kept. `nextflow train data` then builds the library from DIR.
# Sources and licences: assets/ATTRIBUTION.md.
set -eu

dir=${1:-data}
mkdir -p "$dir"
scratch=$(mktemp -d "$dir/fetch.XXXXXX")
trap 'rm -rf "$scratch"' EXIT
trap 'exit 130' INT TERM

for package in \
    @lobehub/fluent-emoji-3d@1.1.0 \
    @iconify-json/fluent-emoji-flat@1.2.6 \
    @iconify-json/noto@1.2.9 \
    emojibase-data@17.0.0
do
    # @scope/name@1.2.3 -> scope-name-1.2.3, as npm names its archives
    folder=$(printf '%s\n' "$package" | sed 's/^@//; s/[@/]/-/g')
    if [ -d "$dir/$folder" ]; then
        echo "$folder: already there" >&2
        continue
    fi
    echo "$folder: fetching" >&2
    (cd "$scratch" && npm pack --silent "$package" >/dev/null && tar -xzf "$folder.tgz")
    # Moved into place whole, so that an interrupted run leaves no half package.
    mv "$scratch/package" "$dir/$folder"
    rm -f "$scratch/$folder.tgz"
done
