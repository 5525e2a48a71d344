"""Tokenizers: streamed text equals decoded text, chats render as the model's own template says, errors are one line."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from surefoot import canaries
from surefoot.core.errors import InputError, ModelError, SurefootError
from surefoot.weights import tokenizer_files
from surefoot.weights.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT.parent / "shared" / "data" / "models"
FOLDERS = {name: canaries.path(name) for name in canaries.CANARIES}
FOLDERS |= {n: MODELS / n for n in ("llama-3.2-1b-instruct", "qwen3.5-0.8b-base", "stories260K")}
ALL = [*FOLDERS, "byte-fallback"]
CANARY = "canary-llama"


def byte_fallback_folder(folder: Path) -> Path:
    """A tokenizer in the style of Llama 2: ▁ for space, 256 byte tokens for what the vocabulary lacks."""
    from tokenizers import AddedToken, decoders, models, normalizers
    from tokenizers import Tokenizer as Backend

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abcdefgh", "▁a", "bc", "é", "你"]
    backend = Backend(
        models.BPE(
            {p: i for i, p in enumerate(pieces)}, [("▁", "a"), ("b", "c")], unk_token="<unk>", byte_fallback=True
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


@functools.cache
def loaded(name: str) -> Tokenizer:
    return Tokenizer.load(FOLDERS[name])


@pytest.fixture(scope="session")
def tokenizer_of(tmp_path_factory):
    FOLDERS["byte-fallback"] = byte_fallback_folder(tmp_path_factory.mktemp("byte-fallback"))

    def get(name: str) -> Tokenizer:
        if not (FOLDERS[name] / "tokenizer.json").is_file():
            pytest.skip(f"{FOLDERS[name]} is not there")
        return loaded(name)

    return get


@pytest.fixture
def canary_copy(tmp_path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(FOLDERS[CANARY], folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def streamed(tokenizer: Tokenizer, ids: list[int], skip: bool = True) -> list[str]:
    stream = tokenizer.stream(skip_special_tokens=skip)
    return [*(stream.push(i) for i in ids), stream.flush()]


def line(error: pytest.ExceptionInfo[SurefootError]) -> str:
    message = str(error.value)
    assert message and "\n" not in message
    return message


relaxed = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("name", ALL)
@relaxed
@given(data=st.data())
def test_stream_of_any_tokens_equals_decode(tokenizer_of, name, data):
    """Any ids: invalid UTF-8, special tokens in the middle of a character, ids beyond the vocabulary."""
    tokenizer = tokenizer_of(name)
    n = tokenizer.vocab_size
    id_ = st.one_of(st.integers(0, n + 2), st.integers(0, min(n, 300)), st.sampled_from(sorted(tokenizer._special)))
    ids = data.draw(st.lists(id_, max_size=24))
    skip = data.draw(st.booleans())
    assert "".join(streamed(tokenizer, ids, skip)) == tokenizer.decode(ids, skip)


@pytest.mark.parametrize("name", ALL)
@relaxed
@given(text=st.one_of(st.text(max_size=30), st.text("a b你好,。🙂👩‍👧é\n\t", max_size=30)), skip=st.booleans())
def test_stream_of_any_text_equals_decode(tokenizer_of, name, text, skip):
    """Real text: also never a replacement character for one that is only split over tokens."""
    tokenizer = tokenizer_of(name)
    ids = tokenizer.encode(text)
    pieces = streamed(tokenizer, ids, skip)
    assert "".join(pieces) == tokenizer.decode(ids, skip)
    if "\N{REPLACEMENT CHARACTER}" not in text and name != "stories260K":  # which has no bytes 0..2: they are specials
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_text_comes_as_soon_as_it_is_final(tokenizer_of):
    tokenizer = tokenizer_of(CANARY)
    text = "The capital 🙂 of 中国"
    ids = tokenizer.encode(text, add_special_tokens=False)
    so_far = ""
    for piece, end in zip(streamed(tokenizer, ids), range(1, len(ids) + 1)):
        so_far += piece
        whole = tokenizer.decode(ids[:end])
        assert so_far == whole.rstrip("\N{REPLACEMENT CHARACTER}")
    assert so_far == text


def test_unfinished_character_comes_out_at_the_end(tokenizer_of):
    tokenizer = tokenizer_of(CANARY)
    ids = tokenizer.encode("🙂", add_special_tokens=False)
    assert len(ids) > 1
    pieces = streamed(tokenizer, ids[:-1])
    assert set(pieces[:-1]) == {""} and pieces[-1] == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("special", [True, False])
def test_encode_and_decode_agree_with_transformers(tokenizer_of, name, special):
    tokenizer = tokenizer_of(name)
    for text in ("", "abc a , b .", "  two  spaces\n", "你好 🙂", "<|eot_id|>x<|im_end|></s>"):
        ids = tokenizer.encode(text, add_special_tokens=special)
        assert ids == tokenizer.hf(text, add_special_tokens=special)["input_ids"]
        for skip in (True, False):
            theirs = tokenizer.hf.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert tokenizer.decode(ids, skip) == theirs


@pytest.mark.parametrize("name", ALL)
def test_bytes_of_tokens(tokenizer_of, name):
    tokenizer = tokenizer_of(name)
    text = "a bc é 你 🙂"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode().removeprefix(" ") == text
    assert "".join(map(tokenizer.token_text, ids[:2])).removeprefix(" ").startswith("a")
    assert tokenizer.token_bytes(10**6) == b"" and tokenizer.token_text(10**6) == ""


def test_half_a_surrogate_pair_is_refused(tokenizer_of):
    with pytest.raises(InputError) as error:
        tokenizer_of(CANARY).encode("ab\ud83d")
    assert "at character 2" in line(error)


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("canary-llama", {"<|end_of_text|>", "<|eot_id|>"}),
        ("canary-qwen3.5", {"<|endoftext|>", "<|im_end|>"}),
        ("llama-3.2-1b-instruct", {"<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"}),
        ("qwen3.5-0.8b-base", {"<|endoftext|>", "<|im_end|>"}),
        ("stories260K", {"<s>", "</s>"}),
    ],
)
def test_end_tokens_of_all_files_count(tokenizer_of, name, texts):
    tokenizer = tokenizer_of(name)
    assert {tokenizer.token_text(i) for i in tokenizer.eos_token_ids} == texts


def test_generation_defaults(canary_copy):
    config = {"temperature": 0.6, "top_p": 0.9, "top_k": None, "eos_token_id": 3, "transformers_version": "5"}
    (canary_copy / "generation_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(canary_copy)
    assert tokenizer.generation_defaults == {"temperature": 0.6, "top_p": 0.9}
    assert 3 in tokenizer.eos_token_ids


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "中国的首都是哪里?"},
    {"role": "assistant", "content": "北京。"},
    {"role": "user", "content": "And of France?"},
]


@pytest.mark.parametrize("name", [*canaries.CANARIES, "llama-3.2-1b-instruct", "qwen3.5-0.8b-base"])
@pytest.mark.parametrize("prompt", [True, False])
def test_chat_is_what_transformers_renders(tokenizer_of, name, prompt):
    tokenizer = tokenizer_of(name)
    text = tokenizer.render_chat(CHAT, add_generation_prompt=prompt)
    assert text == tokenizer.hf.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=prompt)
    ids = tokenizer.encode_chat(CHAT, add_generation_prompt=prompt)
    assert ids == tokenizer.hf.apply_chat_template(CHAT, return_dict=False, add_generation_prompt=prompt)
    if tokenizer.hf.bos_token_id is not None:
        assert ids.count(tokenizer.hf.bos_token_id) == 1
    as_parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in CHAT]
    assert tokenizer.render_chat(as_parts, add_generation_prompt=prompt) == text


def with_template(folder: Path, template: str | None) -> Tokenizer:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return Tokenizer.load(folder)


TEMPLATES = [
    "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}|"
    "{{ bos_token }}{{ eos_token }}{{ tools }}{{ documents }}|{{ unknown }}",
    "{{ messages | tojson }}{{ {'b': '<é>', 'a': 1} | tojson(indent=1, sort_keys=true) }}",
    "{% set ns = namespace(n=1) %}{% for m in messages %}{% set ns.n = 1 + ns.n %}{% endfor %}{{ ns.n, dict(a=1) }}",
    "  {% if true %}\n  x\n  {% endif %}\n{{ strftime_now('%Y') }}{{ mood }}",
    "{% for m in messages %}{{ m.reasoning_content }}{{ m.thinking }}{{ m | length }}{% endfor %}",
]
ODD_CHAT = [*CHAT, {"role": "assistant", "content": None, "reasoning": "why", "tool_calls": [{"name": "f"}]}]


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_mean_what_they_mean_in_transformers(canary_copy, template):
    tokenizer = with_template(canary_copy, template)
    given = {"tools": [{"type": "function"}], "mood": "calm"}
    from transformers.utils import chat_template_utils

    # Older ones do not know of reasoning, and show fields without a value.
    chat = ODD_CHAT if hasattr(chat_template_utils, "_alias_reasoning_fields") else CHAT
    theirs = tokenizer.hf.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, **given)
    assert tokenizer.render_chat(chat, **given) == theirs


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{% set ns = namespace(__init__=1) %}",
        "{{ dict.mro() }}",
    ],
)
def test_templates_stay_in_their_sandbox(canary_copy, template):
    with pytest.raises(InputError):
        assert with_template(canary_copy, template).render_chat(CHAT) == "unreachable"


@pytest.mark.parametrize("name", [n for n in FOLDERS if n != "stories260K"])
def test_without_transformers_it_is_the_same_tokenizer(tokenizer_of, name):
    tokenizer = tokenizer_of(name)
    theirs = Tokenizer(FOLDERS[name], None, *({"eos_token_id": sorted(tokenizer.eos_token_ids)}, {}))
    assert theirs._backend is theirs.hf.backend_tokenizer and tokenizer._backend is not theirs._backend
    for attribute in ("vocab_size", "_special", "eos_token_ids", "bos_token_id", "special_tokens", "chat_template"):
        assert getattr(tokenizer, attribute) == getattr(theirs, attribute), attribute
    assert tokenizer._byte_level == theirs._byte_level and tokenizer.vocab_size == len(theirs.hf)


CHANGES = {
    "another class": {"tokenizer_class": "LlamaTokenizer"},
    "a token to add": {"added_tokens_decoder": {"5": {"content": "<new>", "special": True}}},
    "another flag": {"added_tokens_decoder": {"0": {"special": False}}},
    "a special token that is none": {"sep_token": "the"},
    "one more": {"additional_special_tokens": ["<|another|>"]},
    "another way to split": {"pretokenize_regex": "x+"},
    "several templates": {"chat_template": [{"name": "default", "template": "x"}]},
    "specials as text": {"split_special_tokens": True},
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_transformers_would_change_is_left_to_it(canary_copy, change):
    assert tokenizer_files.read(canary_copy) is not None
    path = canary_copy / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | CHANGES[change]))
    assert tokenizer_files.read(canary_copy) is None


def test_transformers_is_not_imported_where_it_is_not_needed():
    code = (
        "import sys; from pathlib import Path; from surefoot.weights.tokenizer import Tokenizer;"
        "t = Tokenizer.load(Path(sys.argv[1])); ids = t.encode_chat([{'role': 'user', 'content': 'a'}]); t.decode(ids);"
        "assert 'transformers' not in sys.modules and 'torch' not in sys.modules, 'imported'"
    )
    subprocess.run([sys.executable, "-c", code, str(FOLDERS[CANARY])], cwd=ROOT, check=True, timeout=120)


TWO_PARTS = [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}]
STRINGS = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
EACH_PART = "{% for p in m.content %}{% if p.type == 'text' %}({{ p.text }}){% endif %}{% endfor %}"
PARTS = "{% for m in messages %}" + EACH_PART + "{% endfor %}"
BOTH = (
    "{% for m in messages %}{% if m.content is string %}({{ m.content }})"
    "{% else %}" + EACH_PART + "{% endif %}{% endfor %}"
)


def test_content_is_given_as_the_template_takes_it(canary_copy):
    tokenizer = with_template(canary_copy, STRINGS)
    assert tokenizer.render_chat(TWO_PARTS) == "[one\ntwo]"
    tokenizer = with_template(canary_copy, PARTS)
    assert tokenizer.render_chat(TWO_PARTS) == "(one)(two)"
    assert tokenizer.render_chat([{"role": "user", "content": "one"}]) == "(one)"
    tokenizer = with_template(canary_copy, BOTH)
    assert tokenizer.render_chat(TWO_PARTS) == "(one)(two)"
    assert tokenizer.render_chat([{"role": "user", "content": "one"}]) == "(one)"


def test_template_arguments_reach_the_template(canary_copy):
    tokenizer = with_template(canary_copy, "{{ mood | default('calm') }}{% if add_generation_prompt %}>{% endif %}")
    assert tokenizer.render_chat(CHAT) == "calm>"
    assert tokenizer.render_chat(CHAT, add_generation_prompt=False, mood="gay") == "gay"


@pytest.mark.parametrize(
    ("template", "pattern"),
    [
        (None, "no chat template: use plain completion"),
        ("{{ raise_exception('Roles must\nalternate') }}", "refuses these messages: Roles must alternate"),
        ("{% for m in messages %}", "cannot be compiled (line 1: "),
        ("{{ messages[0].content + 3 }}", "fails on these messages: TypeError: can only concatenate str"),
        ("{{ nothing.at_all }}", "refuses these messages: 'nothing' is undefined"),
    ],
)
def test_template_trouble_is_one_line(canary_copy, template, pattern):
    tokenizer = with_template(canary_copy, template)
    assert tokenizer.has_chat_template == (template is not None)
    with pytest.raises(InputError) as error:
        tokenizer.render_chat(CHAT)
    assert pattern in line(error)


@pytest.mark.parametrize(
    ("messages", "pattern"),
    [
        ([], "at least one message"),
        ("hello", "at least one message"),
        (["hello"], "message 0 must be an object with a role"),
        ([{"content": "x"}], "message 0 must be an object with a role"),
        ([{"role": "user", "content": 3}], 'must be a string or a list of {"type": "text"'),
        ([{"role": "user", "content": [{"type": "text"}]}], "content of type 'text': only text"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "content of type 'image_url'"),
    ],
)
def test_impossible_messages(tokenizer_of, messages, pattern):
    with pytest.raises(InputError) as error:
        tokenizer_of(CANARY).render_chat(messages)
    assert pattern in line(error)


def test_folder_without_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert Tokenizer.try_load(tmp_path) is None
    with pytest.raises(ModelError) as error:
        Tokenizer.load(tmp_path)
    assert "no tokenizer in" in line(error)


@pytest.mark.parametrize(
    ("file", "content", "pattern"),
    [
        ("tokenizer.json", '{"version": "1.0",', "tokenizer.json is not valid JSON"),
        ("tokenizer.json", "{}", "cannot load the tokenizer"),
        ("tokenizer_config.json", "[", "tokenizer_config.json is not valid JSON"),
        ("generation_config.json", "[]", "must be a JSON object"),
    ],
)
def test_broken_tokenizer_files(canary_copy, file, content, pattern):
    (canary_copy / file).write_text(content)
    for load in (Tokenizer.load, Tokenizer.try_load):
        with pytest.raises(ModelError) as error:
            load(canary_copy)
        assert pattern in line(error)


def test_the_folders_code_is_never_run(canary_copy):
    config = json.loads((canary_copy / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": [None, "evil.Evil"]}}
    (canary_copy / "tokenizer_config.json").write_text(json.dumps(config))
    (canary_copy / "evil.py").write_text(f"open({str(canary_copy / 'ran')!r}, 'w')")
    try:
        Tokenizer.load(canary_copy)
    except ModelError as error:
        assert "\n" not in str(error)
    assert not (canary_copy / "ran").exists()


def test_threads_may_encode_at_once(tokenizer_of):
    tokenizer = tokenizer_of(CANARY)
    texts = [f"question {i} 你好 " * 40 for i in range(200)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(tokenizer.encode, texts))
    assert results == [tokenizer.encode(text) for text in texts]


def test_loading_is_lazy_and_quiet(tmp_path):
    """Importing the module costs nothing; loading and decoding say nothing on stderr, not even advice."""
    folder = byte_fallback_folder(tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"clean_up_tokenization_spaces": True, "model_max_length": 4}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    code = (
        "import sys; from pathlib import Path; from surefoot.weights.tokenizer import Tokenizer;"
        "assert 'transformers' not in sys.modules and 'torch' not in sys.modules;"
        "t = Tokenizer.load(Path(sys.argv[1])); text = 'a bc , d . ' * 9;"
        "assert t.decode(t.encode(text)) == text"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
