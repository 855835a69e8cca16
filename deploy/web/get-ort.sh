#!/bin/sh
# Fetch the runtime of the page: sh get-ort.sh [DIRECTORY]   (default: ort/ beside this script)
# Needs npm, which checks the archive's sum. Of its 33 MB, two files of 14 MB are kept; a server that
# compresses sends them as 4 MB. The module is renamed to .js: many servers do not serve .mjs as JavaScript.
set -eu
version=1.30.0
into=${1:-$(dirname "$0")/ort}
mkdir -p "$into"
temporary=$(mktemp -d "$into/fetching.XXXXXX")  # on the same file system, so that mv is atomic
trap 'rm -rf "$temporary"' EXIT
npm pack --silent --pack-destination "$temporary" "onnxruntime-web@$version" >"$temporary/name"
tar xzf "$temporary/onnxruntime-web-$version.tgz" -C "$temporary"
mv "$temporary/package/dist/ort-wasm-simd-threaded.wasm" "$into/"
mv "$temporary/package/dist/ort.wasm.bundle.min.mjs" "$into/ort.wasm.bundle.min.js"
# In a bundle, the model is in the folder above: a server started in this one cannot reach it without a link.
[ $# -gt 0 ] || [ ! -f "$into/../../model.onnx" ] || ln -sf ../../model.onnx "$into/model.onnx"
echo "onnxruntime-web $version: $into"
