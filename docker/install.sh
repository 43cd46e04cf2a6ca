#!/bin/sh
# Installs synthward for one kind of machine into /opt/synthward, as a step of docker/Dockerfile.
# Read from the build: TORCH (cpu or cuda), TORCH_INDEX (an index with CPU builds of torch), PIP_ARGS (more for pip).
set -eu
kind=$1
home=/opt/synthward
[ -d "$home" ] || python -m venv --without-pip "$home"
# PIP_ARGS is several words on purpose.
# shellcheck disable=SC2086
add() {
    python -m pip --python "$home/bin/python" --disable-pip-version-check install --no-cache-dir --quiet \
        --constraint constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} ${PIP_ARGS:-} "$@"
}

if [ "$kind" = site ] && [ "$TORCH" = cpu ]; then
    torch=$(sed -n 's/^torch==//p' constraints.txt)
    add "torch==$torch+cpu" || {
        echo "error: no CPU build of torch $torch was found, and the one with CUDA is some GB larger." \
            "Give --build-arg TORCH_INDEX=ADDRESS (PyTorch's index of CPU builds), or --build-arg TORCH=cuda." >&2
        exit 1
    }
fi
case $kind in
    carrier) add . ;;
    *) add ".[$kind]" ;;
esac

# uv is there for installations at run time, which are switched off. The packages' own tests are never run here, and
# nothing compiles or checks types.
rm -f "$home/bin/uv" "$home/bin/uvx"
find "$home/lib" -depth -type d \( -name tests -o -name SelfTest \) -exec rm -rf {} +
find "$home/lib" -type f -regex '.*\.\(pyi\|pyx\|pxd\|c\|cpp\|h\|hpp\|a\)' -delete
