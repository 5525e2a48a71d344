"""Stop conditions, held-back text and finish reasons, checked against a reader of single characters."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surefoot.core.outputs import RequestOutput, TokenLogprob
from surefoot.core.request import Request
from surefoot.core.sampling import SamplingParams
from surefoot.engine.outputs import Accumulator, OutputProcessor, StopStrings

EOS = 0


class Bytes:
    """A decode stream whose token ids name chunks of UTF-8 bytes; ids that are not in the table are special tokens."""

    def __init__(self, table: dict[int, bytes]) -> None:
        self.table, self.pending = table, b""

    def push(self, token_id: int) -> str:
        self.pending += self.table.get(token_id, b"")
        for cut in range(len(self.pending), max(len(self.pending) - 4, -1), -1):
            try:
                text = self.pending[:cut].decode()
            except UnicodeDecodeError:
                continue
            self.pending = self.pending[cut:]
            return text
        return ""

    def flush(self) -> str:
        text, self.pending = self.pending.decode(errors="replace"), b""
        return text


def processor(chunks: list[bytes], max_model_len: int = 10_000, prompt: int = 3, **params) -> OutputProcessor:
    """Token id i + 1 decodes to chunks[i]."""
    params.setdefault("max_tokens", 1000)
    request = Request("r", [7] * prompt, SamplingParams(**params), eos_token_ids=frozenset({EOS}))
    return OutputProcessor(request, Bytes({i + 1: c for i, c in enumerate(chunks)}), max_model_len)


def run(p: OutputProcessor, ids: list[int]) -> tuple[str, list[RequestOutput]]:
    outputs: list[RequestOutput] = []
    for token in ids:
        outputs.append(p.process(token))
        if p.finished:
            break
    return "".join(o.text for o in outputs), outputs


def decode(chunks: list[str] | list[bytes], **params) -> tuple[str, OutputProcessor, list[RequestOutput]]:
    """Run all chunks, then eos."""
    raw = [c.encode() if isinstance(c, str) else c for c in chunks]
    p = processor(raw, **params)
    text, outputs = run(p, [*range(1, len(raw) + 1), EOS])
    return text, p, outputs


def read_by_character(text: str, stop: list[str], include: bool) -> tuple[str, str | None]:
    """The definition: at each character, does some stop string end here? The longest one began first."""
    for end in range(1, len(text) + 1):
        for s in sorted(stop, key=len, reverse=True):
            if text[:end].endswith(s):
                return text[: end if include else end - len(s)], s
    return text, None


def cut(text: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(c % (len(text) + 1) for c in cuts), len(text)]
    return [text[a:b] for a, b in zip(edges, edges[1:])]


words = st.text(alphabet="ab首都🙂", max_size=24)
stops = st.lists(st.text(alphabet="ab首都🙂", min_size=1, max_size=4), max_size=4)


@given(words, stops, st.booleans(), st.lists(st.integers(0, 1000), max_size=30))
def test_cutting_into_tokens_changes_nothing(text: str, stop: list[str], include: bool, cuts: list[int]) -> None:
    """Pieces end in the middle of characters too, and may be empty."""
    chunks = cut(text.encode(), cuts)
    got, p, _ = decode(chunks, stop=tuple(stop), include_stop_str_in_output=include)
    expected, reason = read_by_character(text, stop, include)
    assert (got, p.finish_reason, p.stop_reason) == (expected, "stop", reason)


@given(words, stops, st.lists(st.integers(0, 1000), max_size=30))
def test_no_more_text_is_held_back_than_needed(text: str, stop: list[str], cuts: list[int]) -> None:
    """After each piece, what is held back is the longest ending that begins a stop string."""
    strings = StopStrings(stop)
    given_out, seen = "", ""
    for end in sorted(c % (len(text) + 1) for c in cuts):
        piece, seen = text[len(seen) : end], text[:end]
        final, match = strings.push(piece)
        given_out += final
        if match is not None:
            return
        held = next(
            (seen[i:] for i in range(len(seen)) if any(s != seen[i:] and s.startswith(seen[i:]) for s in stop)), ""
        )
        assert given_out + held == seen and strings.held == held


def test_the_stop_string_that_is_complete_first_wins() -> None:
    assert decode(["x12345"], stop=("12345", "34"))[0] == "x12"
    assert decode(["x1", "2", "3", "4"], stop=("12345", "34"))[0] == "x12"
    text, p, _ = decode(["a", "bc"], stop=("bc", "abc"))
    assert (text, p.stop_reason) == ("", "abc"), "both end together: the one that began first"


def test_stop_string_across_tokens_keeps_the_tokens() -> None:
    text, p, outputs = decode(["one ST", "O", "P two", "three"], stop=("STOP",))
    assert text == "one " and [o.text for o in outputs] == ["one ", "", ""]
    assert [t for o in outputs for t in o.token_ids] == [1, 2, 3]
    assert (p.finish_reason, p.stop_reason) == ("stop", "STOP") and outputs[-1].finished
    assert decode(["one ST", "O", "P two"], stop=("STOP",), include_stop_str_in_output=True)[0] == "one STOP"


def test_a_false_alarm_is_given_out_late_and_whole() -> None:
    _, _, outputs = decode(["ST", "O", "RE"], stop=("STOP",))
    assert [o.text for o in outputs] == ["", "", "STORE", ""]
    _, _, outputs = decode(["ST"], stop=("STOP",))
    assert [o.text for o in outputs] == ["", "ST"], "eos releases what was held back"


def test_characters_cut_into_bytes() -> None:
    raw = "首都🙂".encode()
    text, p, outputs = decode([raw[i : i + 1] for i in range(len(raw))])
    assert text == "首都🙂"
    assert [len(o.text) for o in outputs] == [0, 0, 1, 0, 0, 1, 0, 0, 0, 1, 0]
    assert decode([raw[:4]])[0] == "首\ufffd", "an unfinished character at the end is a replacement character"


def test_eos() -> None:
    text, p, outputs = decode(["hi"])
    assert (text, p.finish_reason, p.stop_reason) == ("hi", "stop", None)
    assert outputs[-1].token_ids == [EOS] and outputs[-1].num_output_tokens == 2
    p = processor([b"a", b"b"], ignore_eos=True, max_tokens=3)
    assert run(p, [1, EOS, 2])[0] == "ab" and p.finish_reason == "length"


@pytest.mark.parametrize("include, text", [(False, "a"), (True, "a\n")])
def test_stop_token(include: bool, text: str) -> None:
    p = processor([b"a", b"\n"], stop_token_ids=(2,), include_stop_str_in_output=include)
    assert run(p, [1, 2])[0] == text
    assert (p.finish_reason, p.stop_reason) == ("stop", 2)


def test_limits() -> None:
    p = processor([b"a"], max_tokens=2)
    assert len(run(p, [1] * 5)[1]) == 2 and p.finish_reason == "length"
    p = processor([b"a"], prompt=6, max_model_len=10)
    assert len(run(p, [1] * 9)[1]) == 4 and p.finish_reason == "length"
    p = processor([b"a", b"b"], max_tokens=2, stop=("b",))
    assert run(p, [1, 2])[0] == "a" and p.finish_reason == "stop", "a stop string in the last token is a stop"
    p = processor([b"ST"], max_tokens=1, stop=("STOP",))
    assert run(p, [1])[0] == "ST" and p.finish_reason == "length"


def test_min_tokens() -> None:
    p = processor([b"a", b"b", b"c"], min_tokens=2, stop=("b", "ab", "bc"), stop_token_ids=(1,))
    text, outputs = run(p, [1, 2, 3])
    assert (text, p.stop_reason, len(outputs)) == ("a", "bc", 3), "begun early, complete after two tokens"
    p = processor([b"b"], min_tokens=1, stop=("b", "xyz"))
    assert p.process(1).text == "b", "passed over, so nothing is held back"
    p = processor([b"a"], min_tokens=2)
    assert len(run(p, [EOS, EOS, EOS])[1]) == 3, "eos cannot end the first two tokens"


def test_error_abort_and_scored() -> None:
    p = processor([b"aST"], stop=("STOP",))
    p.process(1)
    output = p.process(-1)
    assert (output.finished, output.finish_reason, output.text, output.token_ids) == (True, "error", "ST", [])
    with pytest.raises(RuntimeError):
        p.process(1)
    p = processor([b"aST", "都".encode()[:1]], stop=("STOP",))
    run(p, [1, 2])
    assert (p.abort().text, p.finish_reason) == ("ST\ufffd", "abort")
    output = processor([]).scored()
    assert (output.finished, output.finish_reason, output.token_ids, output.text) == (True, "stop", [], "")


def test_without_tokenizer_there_are_tokens_and_no_text() -> None:
    p = OutputProcessor(Request("r", [1], SamplingParams(max_tokens=2)), None, 100)
    text, outputs = run(p, [5, 6])
    assert text == "" and [o.token_ids for o in outputs] == [[5], [6]] and p.finish_reason == "length"


def test_logprobs_are_trimmed_to_what_the_request_asked() -> None:
    logprob = TokenLogprob(1, -0.5, 1, ((1, -0.5), (2, -1.0), (3, -2.0)))
    for asked, expected in ((None, None), (0, ()), (2, ((1, -0.5), (2, -1.0)))):
        output = processor([b"a"], logprobs=asked).process(1, logprob)
        assert expected is None or output.logprobs is not None
        assert (output.logprobs[0].top if output.logprobs else None) == expected


def test_accumulator() -> None:
    collect = Accumulator("r", [7, 7, 7], started=0.0)
    p = processor(["首".encode()[:2], "首".encode()[2:]], logprobs=0)
    for i, token in enumerate([1, 2, EOS]):
        assert not collect.finished
        output = p.process(token, TokenLogprob(token, -float(i), 1))
        if i == 0:
            output.prompt_logprobs = [None]
        collect.add(output)
    done = collect.completion()
    assert collect.finished and done is not None and done.text == "首" and done.token_ids == [1, 2, EOS]
    assert done.finish_reason == "stop" and done.stop_reason is None and done.prompt_logprobs == [None]
    assert [lp.logprob for lp in done.logprobs or []] == [0.0, -1.0, -2.0]
    assert done.ttft_s is not None and done.latency_s is not None and 0 < done.ttft_s <= done.latency_s


def test_outputs_do_not_import_torch() -> None:
    code = "import sys, surefoot.engine.outputs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
