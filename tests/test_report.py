"""The report: every number on it is a number of a record, its plots have axes with units, and a browser takes it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from surefoot.core.errors import SurefootError
from surefoot.report import features, plots, render
from surefoot.report.records import At, Records, known, look_up, place, value
from surefoot.report.texts import Texts
from surefoot.report.units import show
from tests.report_page import Page, check_recorded

RECORDS = json.loads(Path(__file__).with_name("run_records.json").read_text(encoding="utf-8"))
LANGUAGES = ("en", "zh")


def write_records(folder: Path, without: tuple[str, ...] = ()) -> Path:
    """A run folder with the records of a real run, trimmed."""
    for name, data in RECORDS.items():
        if name not in without:
            (folder / f"{name}.json").write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = write_records(tmp_path_factory.mktemp("run"))
    render.render(path, LANGUAGES)
    return path


@pytest.fixture(scope="module")
def page(folder):
    return Page((folder / "report.html").read_text(encoding="utf-8"))


# ---- every number comes from a record


def test_every_recorded_value_is_what_its_record_says(folder, page):
    assert len(page.printed) > 600
    check_recorded(folder, page)


def own_words(language: str) -> str:
    """Everything that a page may say without a record: its catalogue, field names and file names."""
    names = [key for card in (RECORDS["doctor"]["model"]["config"], RECORDS["bench"]["config"]["ops"]) for key in card]
    names += [*RECORDS["bench"]["config"]["versions"], *RECORDS["proof"]["model"]["files_sha256"]]
    return "\n".join([*Texts(language).words.values(), *names, *RECORDS["coverage"]["operators"]])


def test_no_number_stands_outside_of_a_record(page):
    """What is not marked as recorded holds no digits but those of the report's own words (p90, SHA-256)."""
    allowed = set(re.findall(r"\w*\d[\w-]*", own_words("en") + own_words("zh"))) | {"p90", "p99"}
    lengths = set(RECORDS["bench"]["memory"]["capacity"]["requests_of_length"])  # keys of a record
    found = {word for text in page.loose for word in re.findall(r"\w*\d[\w.,-]*", text)}
    assert found <= allowed | lengths, found - allowed - lengths


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_number_of_the_readme_stands_outside_of_a_record(folder, language):
    found = Records(folder)
    drawn = list(plots.PLOTS)
    text, printed = render.markdown(found, language, LANGUAGES, drawn)
    for words, where in sorted(printed, key=lambda p: -len(p[0])):
        assert known_there(folder, where)
        text = text.replace(words, "·")
    text = re.sub(r"\]\([^)]*\)", "", text)
    allowed = set(re.findall(r"\w*\d[\w-]*", own_words(language)))
    assert set(re.findall(r"\w*\d[\w.,-]*", text)) <= allowed


def known_there(folder: Path, where: str) -> bool:
    return look_up(folder, where) is not None


def test_a_tampered_number_is_found(folder, tmp_path):
    """The check above has teeth: a page and another record do not agree."""
    other = write_records(tmp_path)
    bench = json.loads((other / "bench.json").read_text())
    bench["points"][0]["decode"]["tokens_per_s"] *= 1.01
    (other / "bench.json").write_text(json.dumps(bench))
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    with pytest.raises(AssertionError):
        check_recorded(other, page)


def test_every_speed_names_its_proof(page):
    """Both speed sections begin with the proof."""
    assert [a for _, a in page.printed if a["data-record"] == "bench.json#/proof/reason"]
    assert [a for _, a in page.printed if a["data-record"] == "load.json#/proof/reason"]


# ---- plots


def test_every_plot_is_there_with_named_axes_and_units(folder):
    found = Records(folder)
    for language in LANGUAGES:
        drawn = {}
        for name, figure in plots.draw(found, Texts(language)):
            axes = figure.axes[0]
            for label in (axes.get_xlabel(), axes.get_ylabel()):
                assert re.search(r"[(（].+[)）]$", label), f"{name}: the axis {label!r} has no unit"
            assert axes.get_title(loc="left")
            drawn[name] = sum(len(line.get_xdata()) for line in axes.lines)
        assert set(drawn) == set(plots.PLOTS)
        assert all(drawn.values())


def test_plots_show_the_recorded_numbers(folder):
    found = Records(folder)
    for name, figure in plots.draw(found, Texts("en")):
        if name == "decode_by_batch":
            shown = {(x, y) for line in figure.axes[0].lines for x, y in zip(line.get_xdata(), line.get_ydata())}
    points = [p for p in RECORDS["bench"]["points"] if p["output_len"] == 50]
    assert shown == {(p["batch"], p["decode"]["tokens_per_s"]) for p in points}


def test_plot_files_carry_no_marker_colours(folder):
    for path in (folder / "plots").glob("*.svg"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"#0[1-8]0[1-8]0[1-8]", text)
        assert "<rect" in text
    assert len(list((folder / "plots").glob("*.png"))) == len(plots.PLOTS)


# ---- the page


def test_the_page_needs_nothing_from_elsewhere(folder, page):
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"<script|@import|url\((?!#)", html)
    for tag, attributes in page.attributes:
        for name in ("src", "href"):
            where = attributes.get(name, "#")
            assert where.startswith(("#", "data:")) or (folder / where).exists() or where.endswith(".raw.jsonl"), (
                tag,
                where,
            )


def test_ids_are_unique(page):
    ids = [a["id"] for _, a in page.attributes if "id" in a]
    assert len(ids) == len(set(ids))
    links = {a["href"][1:] for tag, a in page.attributes if tag == "a" and a["href"].startswith("#")}
    assert links <= set(ids)


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
def test_it_opens_in_chromium_without_console_errors(folder, tmp_path):
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom",
        f"--user-data-dir={tmp_path}", (folder / "report.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not console
    assert done.stdout.count("<svg") == len(plots.PLOTS) * len(LANGUAGES)


# ---- what is missing, and what is wrong


@pytest.mark.parametrize("stage", [*(n for n in RECORDS if n != "manifest")])
def test_a_stage_without_a_record_is_named(tmp_path, stage):
    folder = write_records(tmp_path, without=(stage,))
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    if stage in manifest["stages"]:
        manifest["stages"][stage] |= {"state": "failed", "level": "bad", "text": "the device is gone"}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    found = Records(folder)
    html = render.html(found, ("en",), {"en": {}})
    assert "None" not in re.sub(r"<style>.*?</style>", "", html, flags=re.S)
    text = render.markdown(found, "en", ("en",), [])[0]
    if stage in manifest["stages"]:
        assert "the device is gone" in html
        assert "the device is gone" in text
        assert Texts("en")["verdict_bad"] in html


def test_a_partial_record_counts_as_absent(tmp_path):
    folder = write_records(tmp_path)
    (folder / "bench.json").write_text(json.dumps(RECORDS["bench"] | {"partial": True}))
    assert not Records(folder)["bench"]


def test_an_empty_folder_is_one_line(tmp_path):
    with pytest.raises(SurefootError, match="not a run folder"):
        render.render(tmp_path, LANGUAGES)


def test_unproven_speed_says_so(tmp_path):
    folder = write_records(tmp_path)
    proof = {"status": "UNPROVEN", "reason": "no proof was named"}
    (folder / "bench.json").write_text(json.dumps(RECORDS["bench"] | {"proof": proof}))
    html = render.html(Records(folder), ("en",), {"en": {}})
    rows = re.findall(r"<tr><td class=\"r\">.*?</tr>", html.split('id="en-speed"')[1].split('id="en-load"')[0])
    assert len(rows) == len(RECORDS["bench"]["points"])
    assert all("unproven" in row for row in rows)


# ---- features


@pytest.mark.parametrize(("peak", "said"), [(0.5, True), (1.5, False)])
def test_a_peak_below_the_cache_says_why(tmp_path, peak, said):
    write_records(tmp_path)
    bench = json.loads((tmp_path / "bench.json").read_text())
    bench["memory"]["peak_bytes"] = int(peak * bench["memory"]["kv_cache_bytes"])
    (tmp_path / "bench.json").write_text(json.dumps(bench))
    render.render(tmp_path, LANGUAGES)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert [Texts(language)["peak_below_cache"] in html for language in LANGUAGES] == [said, said]


def test_green_has_a_linked_record(folder):
    for feature in features.features(Records(folder)):
        if feature.state == "good":
            assert known(feature.evidence)
            assert look_up(folder, place(feature.evidence)) == value(feature.evidence)


def test_without_a_proof_nothing_of_it_is_green(tmp_path):
    found = features.features(Records(write_records(tmp_path, without=("proof",))))
    assert {f.name for f in found if f.state == "good"} == {"known", "server", "memory", "npu"}


def test_a_failed_path_is_red(tmp_path):
    folder = write_records(tmp_path)
    proof = json.loads(json.dumps(RECORDS["proof"]))
    row = next(f for f in proof["findings"] if f["details"].get("path") == "prefix miss = hit")
    row["status"] = "fail"
    (folder / "proof.json").write_text(json.dumps(proof))
    states = {f.name: f.state for f in features.features(Records(folder))}
    assert states["prefix"] == "bad"
    assert states["chunked"] == "good"


# ---- words and numbers


def test_both_languages_say_everything():
    en, zh = Texts("en").words, Texts("zh").words
    assert en.keys() == zh.keys()
    for key in en:
        assert en[key].count("{}") == zh[key].count("{}"), key


@pytest.mark.parametrize(
    "number, unit, text",
    [  # what a record says, how it is shown
        (0.00107721, "s", "1.08 ms"), (0.00107721, "ms", "1.08 ms"), (5.31, "s", "5.31 s"), (4.2e-6, "s", "4.20 µs"),
        (0, "s", "0 s"), (3345152, "bytes", "3.19 MiB"), (1672576, "int", "1,672,576"), (928.3, "tok/s", "928 tok/s"),
        (4149.2, "tok/s", "4,149 tok/s"), (9.78e-5, "nats", "9.78e-5 nats"), (0.9945, "%", "99.5 %"),
        (1.0, "%", "100.0 %"),
        (-0.18, "+%", "-18 %"), (1.24e11, "FLOP/s", "124 GFLOP/s"), (None, "ms", "–"), (32, "", "32"),
        (True, "", "True"),
    ],
)  # fmt: skip
def test_numbers_as_people_read_them(number, unit, text):
    assert show(number, unit) == text


def test_a_place_survives_odd_keys(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"a/b": [{"~c": 3}]}))
    at = Records(tmp_path)["x"]["a/b"][0]["~c"]
    assert isinstance(at, At)
    assert place(at) == "x.json#/a~1b/0/~0c"
    assert look_up(tmp_path, place(at)) == value(at) == 3
