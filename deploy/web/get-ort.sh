#!/bin/sh
# Fetch the runtime of the page: sh get-ort.sh [DIRECTORY]   (default: ort/ beside this script)
# Needs npm, which checks the archive's sum (33 MB, two files of which are kept: 14 MB, sent as 4 MB where a server
# compresses). The module is renamed to .js, as many servers do not know that .mjs is JavaScript.
set -eu
version=1.30.0
into=${1:-$(dirname "$0")/ort}
mkdir -p "$into"
place=$(mktemp -d "$into/fetching.XXXXXX")  # on the same file system: what arrives appears whole or not at all
trap 'rm -rf "$place"' EXIT
npm pack --silent --pack-destination "$place" "onnxruntime-web@$version" >"$place/name"
tar xzf "$place/onnxruntime-web-$version.tgz" -C "$place"
mv "$place/package/dist/ort-wasm-simd-threaded.wasm" "$into/"
mv "$place/package/dist/ort.wasm.bundle.min.mjs" "$into/ort.wasm.bundle.min.js"
echo "onnxruntime-web $version: $into"
