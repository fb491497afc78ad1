"""The tables in the documents are what the results say; and how they are made."""

import importlib
import json
import re
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
RESULT = {
    "command": "python benchmarks/cifar10.py",
    "commit": "0123456789ab",
    "device": "a device",
    "versions": {"python": "3.12", "numpy": "2.0", "torch": "2.6"},
    "date": "2026-01-31",
    "note": "A note.",
    "rows": [
        {"model": "small", "parameters": 1234567, "bytes": 5000, "pictures": 10000, "top1": 96.5, "top5": None},
        {"model": "a | b", "parameters": 12, "bytes": 5000, "pictures": 10000, "top1": 7},
        {
            "model": [3, 4],
            "parameters": 12,
            "bytes": 5000,
            "pictures": 10000,
            "top1": 1.005,
            "top5": 99.999,
            "unused": 1,
        },
    ],
}


@pytest.fixture(scope="module")
def tables():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        return importlib.import_module("readme_tables")


def write(folder, **changes):
    (folder / "cifar10.json").write_text(json.dumps(RESULT | changes))


def test_the_documents_are_up_to_date(tables, capsys):
    assert tables.main(["--check"]) == 0, f"run python benchmarks/readme_tables.py: {capsys.readouterr().out}"


def test_every_table_stands_in_a_document(tables):
    texts = "".join(path.read_text() for path in tables.documents())
    assert [name for name in tables.TABLES if f"<!-- begin:{name} -->" not in texts] == []


def test_a_table(tables, tmp_path):
    write(tmp_path)
    assert tables.render("cifar10", tmp_path).splitlines() == [
        "| model | parameters | file / bytes | test pictures | top-1 % | top-5 % |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| small | 1,234,567 | 5,000 | 10,000 | 96.50 | - |",
        "| a \\| b | 12 | 5,000 | 10,000 | 7.00 | - |",
        "| 3, 4 | 12 | 5,000 | 10,000 | 1.00 | 100.00 |",
        "",
        "A note.",
        "",
        "<sub>Measured on a device, 2026-01-31, commit 0123456789ab, python 3.12, torch 2.6: "
        "`python benchmarks/cifar10.py`</sub>",
    ]


def test_what_is_not_measured_says_so(tables, tmp_path):
    assert tables.render("cifar10", tmp_path) == "*Not measured yet.*\n"


def test_models_come_from_the_table_of_weights(tables):
    lines = tables.render("models").splitlines()
    assert lines[2].startswith(
        "| `mamba_vision_T` | 31,794,248 | 4.4 | 224 | ImageNet-1K | 82.3 | 96.2 | [CC-BY-NC-SA-4.0]("
    )
    assert len(lines) == 2 + 12
    assert lines[-1].endswith("| in the package |")


def test_blocks_are_filled_and_filling_again_changes_nothing(tables, tmp_path):
    text = "before\n<!-- begin:cifar10 -->\nold\n<!-- end:cifar10 -->\nafter\n"
    write(tmp_path)
    filled = tables.fill(text, "README.md", tmp_path)
    assert filled.startswith("before\n<!-- begin:cifar10 -->\n\n| model |")
    assert filled.endswith("</sub>\n\n<!-- end:cifar10 -->\nafter\n")
    assert tables.fill(filled, "README.md", tmp_path) == filled


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- begin:cifar10 -->\n", "README.md: every begin marker"),
        ("<!-- end:cifar10 -->\n", "README.md: every begin marker"),
        ("<!-- begin:cifar10 -->\n<!-- end:cpu -->\n", "README.md: every begin marker"),
        ("<!-- begin:cifar10 -->\n<!-- begin:cpu -->\n<!-- end:cifar10 -->\n", "README.md: every begin marker"),
        ("<!-- begin:cifar11 -->\n<!-- end:cifar11 -->\n", "no table 'cifar11'; there are models, parity"),
    ],
)
def test_wrong_markers_are_named(tables, tmp_path, text, message):
    with pytest.raises(tables.TableError, match=message):
        tables.fill(text, "README.md", tmp_path)


def test_results_that_lack_something_are_named(tables, tmp_path):
    write(tmp_path, rows=[{"model": "small", "accuracy": 1}])
    with pytest.raises(
        tables.TableError, match="lack parameters, bytes, pictures, top1, top5; they have accuracy, model"
    ):
        tables.render("cifar10", tmp_path)
    (tmp_path / "cifar10.json").write_text(json.dumps({"rows": []}))
    with pytest.raises(tables.TableError, match="cifar10.json lacks command, commit, date"):
        tables.render("cifar10", tmp_path)


def test_each_of_ours_stands_beside_the_fastest_that_is_as_accurate(tables):
    def row(model, top1, relative, **more):
        shown = {"batch": 128, "picture": "224 x 224", "way": "compile", "images_per_second": 1000 * relative}
        return {"model": model, "top1": top1, "relative": relative} | shown | more

    rows = [
        row("mamba_vision_T", 82.0, 3.0),
        row("mamba_vision_L", 85.0, 1.0),
        row("exact", 82.0, 1.5),
        row("exact", 82.0, 9.0, batch=1),
        row("better", 84.0, 2.0),
        row("better", 84.0, 1.0, way="eager"),
        row("larger pictures", 84.0, 0.5, picture="384 x 384"),
        row("worse", 81.9, 8.0),
        row("convnext_tiny", 81.0, 1.0),
        row("convnext_tiny", 81.0, 0.5, way="eager"),
        row("convnext_large", 83.0, 0.25),
        row("convnext_large", 83.0, 0.125, way="eager"),
    ]
    others = [
        {"model": "mamba_vision_T", "kind": "original", "images_per_second": 200},
        {"model": "convnext_tiny", "kind": "peer", "images_per_second": 100},  # of a slower machine
        {"model": "mamba_vision_L", "kind": "another", "images_per_second": 1},
    ]
    assert tables.rivals(rows, others) == [
        {
            "model": "mamba_vision_T",
            "top1": 82.0,
            "relative": 3.0,
            "rival": "better",
            "rival_top1": 84.0,
            "rival_relative": 2.0,
            "ratio": 1.5,
            "over_large": 12.0,
            "over_original": 1.5,
        },
        {"model": "mamba_vision_L", "top1": 85.0, "relative": 1.0, "over_large": 4.0},
    ]


def test_larger_pictures_stand_beside_the_same_network(tables):
    def row(model, picture, batch, megapixels, way="optimized"):
        return {"model": model, "picture": picture, "batch": batch, "megapixels_per_second": megapixels, "way": way}

    rows = [
        row("mamba_vision_L2", "224 x 224", 1, 7),
        row("mamba_vision_L2", "224 x 224", 128, 200),
        row("mamba_vision_L2", "224 x 224", 167, 120),
        row("mamba_vision_L2", "224 x 224", 128, 300, "optimized-float8"),
        row("mamba_vision_L2_512_21k", "512 x 512", 32, 150),
        row("other", "384 x 384", 128, 1),
    ]
    (found,) = tables.by_pixels(rows)
    assert 1.03 < found.pop("work") < 1.06  # of attention over longer windows; nothing is padded
    assert found == rows[4] | {"usual": 200, "ratio": 0.75, "as_many": 120, "even": 1.25}


def test_the_original_is_met_by_ratios_to_what_both_runs_timed(tables):
    def row(model, way, value, **more):
        same = {"model": model, "way": way, "batch": 1, "picture": "224 x 224"}
        return same | {"milliseconds": value, "images_per_second": value, **more}

    large = row("mamba_vision_T", "optimized", 5.0, picture="1024 x 2048")
    ours = [
        row("mamba_vision_T", "optimized", 0.5),
        large,
        row("convnext_tiny", "compile", 1.0),
        row("other", "compile", 9),
    ]
    theirs = [row("mamba_vision_T", "", 8.0, kind="original"), row("convnext_tiny", "", 2.0, kind="peer")]
    (found,) = tables.latencies(ours, theirs)
    assert found == {
        "model": "mamba_vision_T", "milliseconds": 0.5, "relative": 2.0, "original": 8.0, "over_original": 16.0,
    }  # fmt: skip
    ours = [row("mamba_vision_T", "compiled", 900, peak_gib=4), row("mamba_vision_T", "eager", 1, peak_gib=5)]
    ours += [row("convnext_tiny", "eager", 300, peak_gib=6), row("convnext_tiny", "compiled", 500, peak_gib=6)]
    theirs = [row("mamba_vision_T", "", 400, kind="original", peak_gib=7), row("convnext_tiny", "", 200, kind="peer")]
    found, without_compiler = tables.training_rivals(ours, theirs)
    assert found["over_original"] == 1.5  # 3 times against 2 times
    assert (without_compiler["way"], without_compiler["over_original"]) == ("eager", 1 / 600)
    assert (found["peak_gib"], found["original"], found["original_peak_gib"]) == (4, 400, 7)


def test_peers_that_are_as_accurate_as_ours_and_faster_are_named(tables):
    """docs/speed.md says that there are no others."""
    measured = json.loads((tables.RESULTS / "gpu_inference.json").read_text(encoding="utf-8"))
    rows = tables.best_ways(measured["rows"])
    ours = [row for row in rows if row["model"].startswith(tables.OURS)]
    peers = [row for row in rows if row not in ours]
    assert len(ours) == 6
    assert len(peers) > 5
    faster = {
        (row["model"].removeprefix(tables.OURS), peer["model"])
        for row in ours
        for peer in peers
        if peer["top1"] >= row["top1"] and peer["relative"] >= row["relative"]
    }
    (said,) = re.findall(r"No other model that was timed here[^.]*\.", (tables.ROOT / "docs/speed.md").read_text())
    assert {peer for _, peer in faster} == set(re.findall(r"`(\w+)`", said))
    assert faster == set()


def test_the_picture_of_the_front_is_of_the_present_results(tables):
    pytest.importorskip("matplotlib")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        front = importlib.import_module("front")
    picture = (tables.ROOT / "docs/front.svg").read_text(encoding="utf-8")
    assert front.fingerprint() in picture, "run python benchmarks/front.py"
    for kind in front.points()[0].values():
        assert [name for *_, name in kind if f"<!-- {name} -->" not in picture] == []
