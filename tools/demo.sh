#!/usr/bin/env bash
# What `make demo` runs: prove that this machine computes right, then let both built-in models answer.
set -euo pipefail
bin=${1:-.venv/bin}

echo "1. Does this machine compute right? Known answers and stored logits of two tiny trained models."
echo
echo "$ surefoot selftest"
"$bin/surefoot" selftest

# One thread: for models this small, waking a second one costs more than it brings.
ask() {
  echo
  echo "$ surefoot run $1 \"$2\" --threads 1"
  "$bin/surefoot" run "$1" "$2" --threads 1
}

echo
echo "2. The same two models answer. canary-llama is built like Llama 3.2, canary-qwen3.5 like Qwen3.5."
for model in canary-llama canary-qwen3.5; do
  ask "$model" "What is the capital of France?"
  ask "$model" "中国的首都是哪里?"
done

cat <<EOF

Done: this machine computes both models right. They know only a short list of questions; next, take a real model:

  $bin/surefoot run canary-qwen3.5                               a chat in this terminal
  $bin/surefoot run hf:Qwen/Qwen3.5-0.8B "Write a haiku."        download from Hugging Face and run
  $bin/surefoot run modelscope:Qwen/Qwen3.5-0.8B "写一首诗。"     the same from ModelScope
  $bin/surefoot run /path/to/model "Hello" --device cuda         a local folder, on a GPU
  $bin/surefoot serve canary-llama                               an OpenAI-compatible server
  make test                                                                the proof: every test of the project
EOF
