#!/usr/bin/env bash
# What `make demo` runs: bring a tiny built-in model up on this machine, then let both built-in models answer.
set -euo pipefail
bin=${1:-.venv/bin}

echo "1. One command: does it run, is it right, how fast, against what limit? About two minutes."
echo
# One thread: for models this small, waking a second one costs more than it brings.
echo "$ surefoot bringup canary-llama --quick --threads 1"
found=0
"$bin/surefoot" bringup canary-llama --quick --threads 1 || found=$?
[ "$found" -le 1 ] || exit "$found"  # 1: it ran, and says in its report what is wrong

ask() {
  echo
  echo "$ surefoot run $1 \"$2\" --threads 1"
  "$bin/surefoot" run "$1" "$2" --threads 1
}

echo
echo "2. Two such models answer: canary-llama is built like Llama 3.2, canary-qwen3.5 like Qwen3.5."
ask canary-llama "What is the capital of France?"
ask canary-qwen3.5 "中国的首都是哪里?"

report=$(ls -td runs/canary-llama-*/ | head -n 1)
cat <<EOF

Done. The report, with plots and the record behind every number (open it in a browser):

  ${report}report.html

Next, take a real model:

  $bin/surefoot bringup /path/to/model --device npu:0            the same for your model on your device
  $bin/surefoot run hf:Qwen/Qwen3.5-0.8B "Write a haiku."        download from Hugging Face and run
  $bin/surefoot run modelscope:Qwen/Qwen3.5-0.8B "写一首诗。"     the same from ModelScope
  $bin/surefoot serve canary-llama                               an OpenAI-compatible server
  make test                                                                the proof: every test of the project
EOF
