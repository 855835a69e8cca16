#!/usr/bin/env bash
# Prove a bundle on ARM64, and on an x86-64 processor without AVX, from nothing and without either: in emulation.
#
# An arm64 Debian with Python and QEMU's emulators of user programs are downloaded and unpacked into a cache, without
# root, and without running a script of theirs. The bundle's own requirements.txt is installed there by the emulated
# pip. Then the bundle's commands run as each processor, and every answer is compared with this machine's.
set -euo pipefail

usage() {
    cat <<'END'
usage: prove_arm64.sh BUNDLE [DIR]

BUNDLE  the .zip archive or the directory that step2_export.py --bundle --format onnx onnx-int8 writes
DIR     more images to compare, besides the bundle's samples

A bundle is proven if no answer changes and no probability differs by more than 1e-6 or, for an int8 file, than its
self-test allows (2e-2); `known` may differ by what the self-test allows. So any of the images could be golden samples.

Environment variables:
  CACHE    what is downloaded, about 450 MB (default: ${XDG_CACHE_HOME:-~/.cache}/threestep-arm64). Packages in it
           are not renewed; remove the directory for today's versions
  ARM64    processors (default: cortex-a53 cortex-a72 neoverse-v1), of those that qemu-aarch64 -cpu help lists
  X86      processors (default: Nehalem), of those that qemu-x86_64 -cpu help lists
  PYTHON   this machine's Python, 3.10 or newer (default: python3); a virtual environment of it is made in CACHE
  SUITE    release of Debian that the emulators and the arm64 system are taken from (default: trixie; QEMU 7.2 of
           bookworm is too old and crashes)
  MIRROR   its archive (default: a Debian system's own, otherwise http://deb.debian.org/debian)
  RESULTS  directory of the results file (default: tests/benchmarks/results)

The machine needs x86-64, Debian or Ubuntu, and access to MIRROR and PyPI. Exit codes: 0 proven, 1 an answer or a
command failed, 2 wrong usage.
END
}

die() { # MESSAGE [EXIT CODE]
    echo "error: $1" >&2
    exit "${2:-1}"
}

quietly() { # LOG COMMAND...: its output is shown only if it fails
    local log=$1
    shift
    "$@" >"$log" 2>&1 || {
        tail -n 15 "$log" >&2
        return 1
    }
}

# ---------------------------------------------------------------------------------------------- what is downloaded
own_mirror() { # prints this system's own mirror of Debian, if it is a Debian that has one
    local names
    [[ $(sed -n 's/^ID=//p' /etc/os-release) == debian ]] || return 0
    names="^($(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)|(old)?stable|testing|unstable|sid)\$" # not of updates
    apt-get indextargets --format '$(RELEASE) $(COMPONENT) $(REPO_URI)' 'Created-By: Packages' |
        awk -v names="$names" '$1 ~ names && $2 == "main" && !uri { uri = $3 } END { print uri }'
}

find_keyring() { # FOLDER: sets `keyring` to Debian's keys, which Ubuntu has in a package
    local name=usr/share/keyrings/debian-archive-keyring
    if [[ ! -e /$name.gpg ]]; then
        mkdir -p "$1"
        (cd "$1" && quietly "$work/log" apt-get download debian-archive-keyring) ||
            die "apt cannot fetch debian-archive-keyring; first run apt-get update, or install that package"
        dpkg-deb -x "$1"/*.deb "$1"
    fi
    for keyring in "$1/$name".{gpg,pgp} /$name.{gpg,pgp}; do [[ ! -e $keyring ]] || return 0; done
    die "the package debian-archive-keyring has no $name.gpg"
}

configure_apt() { # FOLDER: a state of apt's own, beside the system's, for a machine where nothing is installed
    mkdir -p "$1/lists/partial" "$1/archives/partial"
    touch "$1/status"
    echo "deb [arch=arm64,amd64 signed-by=$keyring] $mirror $suite main" >"$1/sources.list"
    cat >"$1/apt.conf" <<END
Dir::State "$1"; Dir::State::Lists "$1/lists"; Dir::State::status "$1/status";
Dir::Cache "$1"; Dir::Cache::archives "$1/archives";
Dir::Etc::SourceList "$1/sources.list"; Dir::Etc::SourceParts "/dev/null";
Dir::Etc::Preferences "/dev/null"; Dir::Etc::PreferencesParts "/dev/null";
APT::Architecture "arm64"; APT::Architectures { "arm64"; "amd64"; };
APT::Default-Release ""; APT::Sandbox::User "root"; APT::Install-Recommends "false";
END
    export APT_CONFIG=$1/apt.conf
}

unpack() { # FOLDER PACKAGE...: the files alone, by links from /lib to /usr/lib as every current system has them
    local folder=$1 name package
    shift
    mkdir -p "$folder"/usr/{bin,sbin,lib}
    for name in bin sbin lib; do ln -s "usr/$name" "$folder/$name"; done
    for package; do
        dpkg-deb --fsys-tarfile "$package" | tar -C "$folder" -x --keep-directory-symlink --no-same-owner
    done
}

make_system() { # FOLDER: writes FOLDER/root, the arm64 system, and FOLDER/qemu-aarch64 and FOLDER/qemu-x86_64
    local apt=$work/apt qemu=$work/qemu mirror keyring name
    mirror=${MIRROR:-$(own_mirror)}
    mirror=${mirror:-http://deb.debian.org/debian}
    find_keyring "$work/keyring"
    configure_apt "$apt"
    quietly "$work/log" apt-get update || die "apt cannot read the lists of $suite from $mirror: set SUITE or MIRROR"
    # Python works without the packages' scripts; python3-venv brings pip, and onnxruntime needs libstdc++.
    quietly "$work/log" apt-get install --yes --download-only python3 python3-venv libstdc++6 ||
        die "apt cannot fetch the arm64 packages of $suite from $mirror"
    # Before trixie qemu-user-static contains the static emulators, since then qemu-user.
    (cd "$apt" && quietly "$work/log" apt-get download qemu-user:amd64 qemu-user-static:amd64) ||
        die "apt cannot fetch qemu-user and qemu-user-static of $suite from $mirror"
    unpack "$1/root" "$apt"/archives/*.deb
    unpack "$qemu" "$apt"/qemu-*.deb
    for name in qemu-aarch64 qemu-x86_64; do install "$qemu/usr/bin/$name-static" "$1/$name"; done
    rm -r "$apt" "$qemu"
    unset APT_CONFIG
}

make_venv() { # FOLDER REQUIREMENTS PYTHON [EMULATOR...]: pip itself starts nothing, which only the emulator could do
    local folder=$1 requirements=$2 python=$3 pip name kept=()
    shift 3
    for name in $(compgen -e); do # how pip reaches PyPI from here
        [[ $name =~ ^(PIP_.*|.*_(proxy|PROXY)|SSL_CERT_FILE|REQUESTS_CA_BUNDLE|HOME)$ ]] && kept+=("$name=${!name}")
    done
    pip=$(echo "$system"/root/usr/share/python-wheels/pip-*.whl)/pip
    quietly "$work/log" clean "${kept[@]}" "$@" "$python" -m venv --without-pip "$folder" &&
        quietly "$work/log" clean "${kept[@]}" "$@" "$folder/bin/python" "$pip" install --only-binary :all: \
            --no-compile --progress-bar off -r "$requirements" || die "pip cannot install $requirements for $python"
}

clean() { # [NAME=VALUE...] COMMAND...: what suits this processor, as OPENBLAS_CORETYPE, can crash on another one
    env -i PATH=/usr/bin:/bin LC_ALL=C.UTF-8 HOME="$work" "$@"
}

cached() { # NAME COMMAND...: sets `made` to the folder CACHE/NAME, which COMMAND FOLDER... writes if it is not there
    made=$cache/$1
    [[ -e $made ]] && return
    echo "making $made" >&2
    rm -rf "$cache/new" # of a run that was killed
    mkdir "$cache/new"
    "$2" "$cache/new/$1" "${@:3}"
    mv -T "$cache/new/$1" "$made"
}

# ------------------------------------------------------------------------------------------------- what is proven
check_names() { # EMULATOR VARIABLE NAME...
    local known name
    known=$("$system/$1" -cpu help || true) # QEMU's exit code is 1
    for name in "${@:3}"; do
        grep -qwF -e "$name" <<<"$known" || die "$1 has no processor $name: set $2 to names that it lists" 2
    done
}

prove() { # NAME COMMAND...: the bundle's commands by this Python, then a row of the table for each model file
    local name=$1 step3=$work/bundle/step3_infer.pyz answers=$work/$1.npz model cells
    local -A tested=()
    shift
    echo "running as $name" >&2
    quietly "$work/log" clean "$@" "$step3" --verify || failed "$name: --verify"
    quietly "$work/log" clean "$@" "$step3" "$work/bundle/samples" || failed "$name: predicting the samples"
    for model in "${models[@]}"; do
        quietly "$work/log" clean "$@" "$step3" --self-test --model "$work/bundle/$model" ||
            failed "$name: --self-test of $model"
        tested[$model]=$(sed -n 's/^self-test \([a-zA-Z]*\):.* \([^ ]*\)$/\1, \2/p' "$work/log")
    done
    if ! quietly "$work/log" clean "$@" "$here/answers.py" keep "$work/bundle" "$answers" ${images:+"$images"}; then
        failed "$name: predicting the images"
        return
    fi
    for model in "${models[@]}"; do
        cells="compared with | | | | | |"
        [[ $name == native ]] || cells=$(compare "$answers" "$model") || failed "$name: the answers of $model"
        echo "| $name | $model | ${tested[$model]:-FAILED} | $cells |" >>"$work/table"
    done
}

compare() { # ANSWERS MODEL
    clean "$native/bin/python" "$here/answers.py" compare "$work/native.npz" "$@"
}

failed() { # MESSAGE
    echo "FAILED: $1" >&2
    failures=$((failures + 1))
}

# ------------------------------------------------------------------------------------------------------- the program
[[ ${1:-} == -h || ${1:-} == --help ]] && usage && exit
[[ $# == 1 || $# == 2 ]] || die "give a BUNDLE, and at most one DIR of images (--help shows more)" 2
[[ -e $1 ]] || die "there is no $1; step2_export.py --bundle --format onnx onnx-int8 writes a bundle" 2
[[ $# == 1 || -d $2 ]] || die "$2 is not a directory" 2
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
images=${2:+$(realpath "$2")}
cache=${CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/threestep-arm64}
mkdir -p "$cache" || die "cannot write $cache: set CACHE"
cache=$(realpath "$cache")
python=${PYTHON:-python3}
python=$("$python" -c 'import sys; print(sys.executable * (sys.version_info >= (3, 10)))' 2>/dev/null) || true
[[ $python ]] || die "${PYTHON:-python3} is not a Python of version 3.10 or newer: set PYTHON" 2
read -ra arm64 <<<"${ARM64:-cortex-a53 cortex-a72 neoverse-v1}"
read -ra x86 <<<"${X86:-Nehalem}"
suite=${SUITE:-trixie}
failures=0

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM # and so through the line above
if [[ -d $1 ]]; then
    cp -r "$1" "$work/unpacked"
else
    "$python" -m zipfile -e "$1" "$work/unpacked" 2>"$work/log" || die "$1 is neither a directory nor a zip archive" 2
fi
sums=$(find "$work/unpacked" -maxdepth 2 -name SHA256SUMS -print -quit)
[[ $sums ]] || die "$1 is not a bundle: it has no SHA256SUMS" 2
mv "$(dirname "$sums")" "$work/bundle"
requirements=$work/bundle/requirements.txt
models=()
for model in "$work"/bundle/*.onnx; do [[ -e $model ]] && models+=("${model##*/}"); done
[[ ${#models[@]} -gt 0 ]] || die "$1 has no .onnx file: export with --format onnx onnx-int8" 2

[[ $(uname -m) == x86_64 ]] || die "this machine is $(uname -m): the emulators are for x86-64"
for tool in apt-get dpkg-deb flock install tar; do
    [[ $(command -v $tool) ]] || die "$tool is missing: this script needs Debian or Ubuntu"
done
exec {lock}>"$cache/lock"
flock "$lock" # another run may be writing the same folders
cached "$suite" make_system
system=$made
check_names qemu-aarch64 ARM64 "${arm64[@]}"
check_names qemu-x86_64 X86 "${x86[@]}"
wanted=$(sha256sum "$requirements" | cut -c1-8)
cached "$suite-$wanted" \
    make_venv "$requirements" "$system/root/usr/bin/python3" "$system/qemu-aarch64" -L "$system/root"
emulated=$made
cached "native-$wanted-$("$python" -c 'import sys; print(sys.version + sys.base_prefix)' | sha256sum | cut -c1-8)" \
    make_venv "$requirements" "$python"
native=$made
exec {lock}>&-
prove native "$native/bin/python"
[[ -e $work/native.npz ]] || die "this machine itself cannot predict with the bundle"
for name in "${arm64[@]}"; do
    prove "$name" "$system/qemu-aarch64" -cpu "$name" -L "$system/root" "$emulated/bin/python"
done
for name in "${x86[@]}"; do
    prove "$name" "$system/qemu-x86_64" -cpu "$name" "$native/bin/python"
done

echo "| processor | file | self-test | images | decoded otherwise | answers changed | largest difference | above 1e-4" \
    '| `known` | |'
echo "|---|---|---|---|---|---|---|---|---|---|"
cat "$work/table"
echo
notes=("$("$system/qemu-aarch64" --version | sed -n "1s/^qemu-aarch64 version \([^ ]*\).*/QEMU \1, $suite/p")")
for name in native "${arm64[0]}"; do # the only two environments
    [[ -e $work/$name.npz ]] || continue
    notes+=("$name: $(clean "$native/bin/python" "$here/answers.py" versions "$work/$name.npz")")
done
printf '%s\n' "${notes[@]}"
clean "$native/bin/python" "$here/answers.py" record "$work/table" "${notes[@]}" ${RESULTS:+--results "$RESULTS"}
echo "Emulation shows what a processor's instructions compute; it says nothing of its speed, memory or drivers."
[[ $failures == 0 ]] || die "$failures checks failed"
echo "proven: no answer changed, all differences are within the limits, every command of the bundle succeeded"
