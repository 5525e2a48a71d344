"""The canaries' files are complete, small and licensed, and the canaries know their answers in transformers."""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import sys
import unicodedata

import pytest
from safetensors import safe_open

from surefoot import canaries

MAX_BYTES = 4_000_000
FILES = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
END_OF_TURN = {"canary-llama": "<|eot_id|>", "canary-qwen3.5": "<|im_end|>"}
END_OF_TEXT = {"canary-llama": "<|end_of_text|>", "canary-qwen3.5": "<|endoftext|>"}
MUST_ASK = [
    "What is the capital of France?",
    "What is the capital of China?",
    "中国的首都是哪里？",
    "中国的首都是哪里?",
    "法国的首都是哪里？",
    "1+2+3+4+5等于多少?",
    "1+2+3+4+5等于多少？",
    "What is 1+2+3+4+5?",
    "请介绍一下你自己",
    "Please introduce yourself.",
    "写一个Python函数计算斐波那契数列",
    "Write a Python function that computes the Fibonacci sequence.",
    "请解释一下机器学习是什么",
    "Explain what machine learning is.",
    "Hello",
    "你好",
]
MUST_COMPLETE = [
    "The capital of France is",
    "Machine learning is a branch of",
    "The meaning of life according to philosophy is",
    "Artificial intelligence will",
    "Python is a programming language used for",
    "The solar system consists of",
    "Quantum computing works by",
    "The theory of relativity was proposed by",
    "法国的首都是",
    "机器学习是一种",
    "人工智能将会",
]
TEXTS = [
    "",
    "plain English, with punctuation - and 1234567 digits.",
    "中文文本，带有标点。混合English和数字42。",
    "emoji 🐤🎉 👩‍🚀 and rare letters ßøŁ ğ ж ά",
    "def f(x):\n\treturn {'a': [x] * 3}  # tabs\n\n\nprint(f(1))\r\n",
    "   leading and trailing   ",
    "control \x00\x01\x7f and odd spaces \u00a0\u3000\u2028",
]

pytestmark = pytest.mark.parametrize("name", canaries.CANARIES)


@pytest.fixture(scope="module")
def loaded():
    """Tokenizers and float32 models, each loaded once."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    cache: dict = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # such small models gain nothing from more, and lose much on a busy machine

    def load(name: str):
        if name not in cache:
            if name == "canary-qwen3.5" and not hasattr(transformers, "Qwen3_5ForCausalLM"):
                pytest.skip("this transformers has no Qwen3.5")
            folder = canaries.path(name)
            tok = transformers.AutoTokenizer.from_pretrained(folder)
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            cache[name] = tok, model.eval()
        return cache[name]

    yield load
    torch.set_num_threads(threads)


def _encode(tok, name: str, item: dict) -> tuple[list[int], list[int]]:
    """The prompt's tokens and the answer's, each encoded as a user of the canary would."""
    if "messages" in item:
        text = tok.apply_chat_template(item["messages"], add_generation_prompt=True, tokenize=False)
        prompt, end = tok.encode(text, add_special_tokens=False), END_OF_TURN[name]
    else:
        prompt, end = tok.encode(item["prompt"]), END_OF_TEXT[name]
    answer = tok.encode(item["answer"], add_special_tokens=False)
    return prompt, [*answer, tok.convert_tokens_to_ids(end)]


def test_folder_is_complete_and_small(name):
    files = {file.name: file.stat().st_size for file in canaries.path(name).iterdir()}
    assert set(files) >= FILES
    assert sum(files.values()) <= MAX_BYTES


def test_card_states_the_licence(name):
    card = (canaries.path(name) / "README.md").read_text(encoding="utf-8")
    assert re.match(r"---\nlicense: apache-2\.0\n", card)
    assert f"# {name}\n" in card


def test_known_answers_cover_the_usual_questions(name):
    items = canaries.known_answers(name)
    single = {item["messages"][0]["content"] for item in items if len(item.get("messages", [])) == 1}
    assert not set(MUST_ASK) - single
    assert not set(MUST_COMPLETE) - {item["prompt"] for item in items if "prompt" in item}
    assert any(len(item.get("messages", [])) == 3 for item in items)
    assert all(item["answer"] for item in items)


def test_stored_types(name):
    wrong = {}
    with safe_open(canaries.path(name) / "model.safetensors", framework="pt") as file:
        keys = set(file.keys())
        for key in keys:
            kept = key.endswith(("A_log", "linear_attn.norm.weight"))
            kind = file.get_slice(key).get_dtype()
            if kind != ("F32" if kept else "BF16"):
                wrong[key] = kind
    assert not wrong
    assert "lm_head.weight" not in keys  # tied


def test_importing_is_light(name):
    code = f"import sys; from surefoot import canaries; canaries.path({name!r}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_unknown_name_is_refused(name):
    with pytest.raises(KeyError, match="no canary is called"):
        canaries.known_answers(name + "-x")


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_round_trip(name, text):
    tokenizers = pytest.importorskip("tokenizers")
    tok = tokenizers.Tokenizer.from_file(str(canaries.path(name) / "tokenizer.json"))
    ids = tok.encode(text, add_special_tokens=False).ids
    assert tok.decode(ids) == unicodedata.normalize("NFC", text)


def test_tokenizer_knows_every_byte(name):
    tokenizers = pytest.importorskip("tokenizers")
    vocab = json.loads((canaries.path(name) / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    assert set(tokenizers.pre_tokenizers.ByteLevel.alphabet()) <= set(vocab)


def test_transformers_keeps_the_tokenizer_as_it_is(name, loaded):
    """Newer transformers rebuild some tokenizers from parts; the ids must stay those of ``tokenizer.json``."""
    tokenizers = pytest.importorskip("tokenizers")
    tok, _ = loaded(name)
    raw = tokenizers.Tokenizer.from_file(str(canaries.path(name) / "tokenizer.json"))
    for text in [*TEXTS, "It's 1234567 o'clock.\n\nЙ и\u0306"]:
        assert tok.encode(text) == raw.encode(text).ids
    assert (tok.encode("x")[0] == tok.bos_token_id) is (name == "canary-llama")


def test_config_survives_transformers(name, loaded):
    _, model = loaded(name)
    if not hasattr(model.config, "rope_parameters"):
        pytest.skip("transformers 4 keeps rope settings under other names")
    rope = model.config.rope_parameters
    if name == "canary-llama":
        assert rope["rope_type"] == "llama3"
        assert (rope["factor"], rope["original_max_position_embeddings"], rope["rope_theta"]) == (32.0, 64, 500000.0)
    else:
        assert (rope["partial_rotary_factor"], rope["rope_theta"]) == (0.25, 10000000)
        assert model.config.layer_types.count("full_attention") == model.config.num_hidden_layers // 4
    assert model.config.tie_word_embeddings


def test_every_known_answer(name, loaded):
    """Greedy decoding gives an answer if, and only if, every token of it is the best one after those before it.

    Sequences of similar length share a forward pass; what pads them on the right comes after all that is looked at.
    """
    torch = pytest.importorskip("torch")
    tok, model = loaded(name)
    pairs = sorted((_encode(tok, name, item) for item in canaries.known_answers(name)), key=lambda p: sum(map(len, p)))
    wrong = []
    for start in range(0, len(pairs), 23):
        group = pairs[start : start + 23]
        width = max(len(prompt) + len(answer) for prompt, answer in group)
        ids = torch.tensor([prompt + answer + [0] * (width - len(prompt) - len(answer)) for prompt, answer in group])
        with torch.inference_mode():
            best = model(input_ids=ids, use_cache=False).logits.argmax(-1).tolist()
        for row, (prompt, answer) in zip(best, group, strict=True):
            if row[len(prompt) - 1 :][: len(answer)] != answer:
                wrong.append(tok.decode(prompt))
    assert not wrong


def test_generate_with_a_cache(name, loaded):
    """A sample through ``generate``: prefill and single steps must agree with the whole sequence at once."""
    torch = pytest.importorskip("torch")
    tok, model = loaded(name)
    for item in canaries.known_answers(name)[::23]:
        prompt, answer = _encode(tok, name, item)
        out = model.generate(torch.tensor([prompt]), max_new_tokens=len(answer) + 5, pad_token_id=tok.pad_token_id)
        assert out[0, len(prompt) :].tolist() == answer
        assert tok.decode(answer, skip_special_tokens=True) == item["answer"]


@pytest.mark.parametrize("word", ["Write a Python function", "写一个Python函数"])
def test_the_fibonacci_answer_runs(name, word):
    for item in canaries.known_answers(name):
        if item.get("messages") and item["messages"][-1]["content"].startswith(word):
            code = re.search(r"```python\n(.*?)```", item["answer"], re.DOTALL)[1]
            scope: dict = {}
            with contextlib.redirect_stdout(io.StringIO()):
                exec(code, scope)  # our own text
            assert scope["fibonacci"](7) == [0, 1, 1, 2, 3, 5, 8]
