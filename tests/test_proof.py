"""The proof as a document: recomputed offline, and whatever was altered or cut off is noticed."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
from verify_synthetic import GOOD, logit_evidence, logits, noisy, null_runs

from surefoot.cli.main import run_cli
from surefoot.core.errors import InputError
from surefoot.verify import gate
from surefoot.verify.judge import RULES
from surefoot.verify.pack import pack, unpack
from surefoot.verify.prompts import digest
from surefoot.verify.proof import FORMAT, Damaged, Proof, jsonable, seal


def make(size: float = 1.0, partial: bool = False, wrong: bool = False) -> Proof:
    right = logits(100, vocab=100)
    run = noisy(right, 1, 0.02 * size)
    if wrong:
        run[50] = run[51]
    evidence = jsonable(GOOD | {"logits": logit_evidence(right, run, null_runs(right))})
    verdict, findings = gate.decide(evidence)
    sequences = [[1, 2, 3], [4, 5]]
    return Proof(
        {
            "format": FORMAT,
            "partial": partial,
            "verdict": verdict,
            "model": {"name": "m"},
            "reference": {"dtype": "float32"},
            "target": {"device": "cpu", "dtype": "bfloat16", "backend": "native", "versions": {"torch": "2"}},
            "settings": {},
            "prompts": {
                "source": "s",
                "count": 2,
                "tokens": 5,
                "sha256": digest(sequences),
                "names": ["a", "b"],
                "sequences": sequences,
            },
            "rules": jsonable(RULES),
            "calibration": {},
            "findings": [f.as_dict() for f in findings],
            "localisation": None,
            "cause": None,
            "sensitivity": {},
            "evidence": evidence,
        }
    )


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "proof.json"
    make().save(path)
    return path


def test_a_proof_is_sound_and_readable(saved, capsys):
    proof = Proof.load(saved)
    assert proof.verdict == "proven"
    assert proof.check() == []
    assert run_cli(["proof", "check", str(saved)]) == 0
    assert "sound" in capsys.readouterr().out
    assert run_cli(["proof", "show", str(saved)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("PROVEN: m on cpu in bfloat16")
    assert len(out.splitlines()) < 25
    assert max(map(len, out.splitlines())) < 140


def edit_verdict(data):
    data["verdict"] = "refuted"


def edit_summary(data):
    data["findings"][0]["summary"] = "all is well"


def edit_status(data):
    data["findings"][6]["status"] = "undecided"


def edit_number(data):
    packed = data["evidence"]["logits"]["run"]
    values = unpack(packed["err"])
    packed["err"] = pack(np.where(np.arange(len(values)) == 50, 0.0, values))


def edit_null(data):
    data["evidence"]["logits"]["nulls"].pop()


def edit_dtype(data):
    data["target"]["dtype"] = "float32"


def edit_prompt(data):
    data["prompts"]["sequences"][0][0] = 7


def edit_rules(data):
    data["rules"]["safety"] = 100.0


def drop_finding(data):
    data["findings"].pop()


EDITS = [
    edit_verdict,
    edit_summary,
    edit_status,
    edit_number,
    edit_null,
    edit_dtype,
    edit_prompt,
    edit_rules,
    drop_finding,
]


@pytest.mark.parametrize("edit", EDITS)
def test_every_alteration_is_noticed(saved, edit, capsys):
    data = json.loads(saved.read_text())
    edit(data)
    saved.write_text(json.dumps(data))
    assert run_cli(["proof", "check", str(saved)]) == 1
    assert "altered" in capsys.readouterr().out


@pytest.mark.parametrize("edit", [e for e in EDITS if e not in (edit_dtype, edit_summary)])
def test_a_new_seal_does_not_hide_what_does_not_follow_from_the_numbers(saved, edit):
    data = json.loads(saved.read_text())
    edit(data)
    data["seal"] = seal(data)
    assert Proof(data).check()


def test_a_wrong_token_cannot_be_edited_away_in_the_findings(tmp_path):
    proof = make(wrong=True)
    assert proof.verdict == "refuted"
    good = make()
    forged = copy.deepcopy(jsonable(proof.data))
    forged["verdict"], forged["findings"] = "proven", jsonable(good.data["findings"])
    forged["seal"] = seal(forged)
    assert any("numbers say refuted" in line for line in Proof(forged).check())


@pytest.mark.parametrize("share", [0.0, 0.2, 0.9, 0.999])
def test_a_truncated_proof_is_one_line(saved, share, capsys):
    text = saved.read_text()
    saved.write_text(text[: int(len(text) * share)])
    assert run_cli(["proof", "check", str(saved)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(Damaged):
        Proof.load(saved)


@pytest.mark.parametrize("what", ["n", "f4"])
def test_damaged_numbers_are_one_line(saved, what):
    data = json.loads(saved.read_text())
    data["evidence"]["logits"]["run"]["kl"][what] = "???"
    assert any("damaged" in line for line in Proof(data).check())


def test_missing_and_foreign_files(tmp_path, capsys):
    assert run_cli(["proof", "check", str(tmp_path / "none.json")]) == 2
    (tmp_path / "other.json").write_text("{}")
    assert run_cli(["proof", "show", str(tmp_path / "other.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 2
    (tmp_path / "old.json").write_text('{"format": "surefoot-proof/9"}')
    with pytest.raises(InputError, match="reads surefoot-proof/1"):
        Proof.load(tmp_path / "old.json")


def test_saving_is_all_or_nothing(tmp_path):
    path = tmp_path / "proof.json"
    make().save(path)
    before = path.read_bytes()
    broken = make()
    broken.data["model"]["name"] = "\ud800"  # cannot be encoded
    with pytest.raises(UnicodeEncodeError):
        broken.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["proof.json"]


def test_partial_proofs_say_so(tmp_path, capsys):
    path = tmp_path / "p.json"
    make(partial=True).save(path)
    run_cli(["proof", "show", str(path)])
    assert capsys.readouterr().out.startswith("PARTIAL")


def test_diff(tmp_path, capsys):
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    make().save(a)
    make(wrong=True).save(b)
    assert run_cli(["proof", "diff", str(a), str(a)]) == 0
    assert capsys.readouterr().out == "no difference\n"
    assert run_cli(["proof", "diff", str(a), str(b)]) == 1
    out = capsys.readouterr().out
    assert "verdict: proven -> refuted" in out
    assert "logits: pass" in out


def test_the_logits_of_a_server_are_judged_again():
    """What the server's finding claims does not matter where its raw numbers are there."""
    right = logits(100, vocab=100)
    run = noisy(right, 1)
    run[50] = run[51]
    raw = jsonable(logit_evidence(right, run, null_runs(right)))
    claimed = {"check": "logits", "status": "pass", "summary": "fine", "details": {"raw": raw, "source": "echo"}}
    verdict, findings = gate.decide({"endpoint": {"findings": [claimed]}})
    assert verdict == "refuted"
    assert findings[0].summary.endswith("(echo)")
    assert "raw" not in findings[0].details
