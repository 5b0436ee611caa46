#!/usr/bin/env bash
# benches/report.png: the page of a quickstart's run, as README shows it.
#     benches/picture.sh [RUN]      # RUN: a quickstart's folder; without one it is made by target/release/fourfold
# It needs Chromium.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
chromium=$(command -v chromium || command -v chromium-browser || command -v google-chrome) ||
    { echo "picture.sh: install Chromium" >&2; exit 1; }
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
run=${1:-$scratch/run}
[ -d "$run" ] || target/release/fourfold quickstart --out "$run" >&2
# The curves of PPO alone: warnings, SFT's and the reward model's stand above them.
sed 's|</head>|<style>#warnings, section:not([id]):has(~ section:not([id])) { display: none }</style></head>|' "$run/report.html" >"$scratch/page.html"
page=$scratch/page.html
"$chromium" --headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=1100,842 --force-device-scale-factor=1 \
    --user-data-dir="$scratch/profile" --screenshot="$PWD/benches/report.png" "file://$page" >/dev/null 2>&1
[ -s benches/report.png ] || { echo "picture.sh: no picture was made" >&2; exit 1; }
echo "benches/report.png: $(stat -c %s benches/report.png) bytes" >&2
