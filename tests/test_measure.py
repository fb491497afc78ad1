"""`mambavision benchmark` and `profile`: what they count, time, print and say when something is wrong."""

import csv
import dataclasses
import io
import json
import re
import sys
import time

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from mambavision import create_model
from mambavision.cli import benchmark, main
from mambavision.layers.mixer import MambaVisionMixer
from mambavision.measure import timing
from mambavision.measure.memory import OutOfMemoryError
from mambavision.measure.plots import plot_speeds
from mambavision.measure.profiling import REST, profile_operations, profile_parts
from mambavision.measure.subjects import Subject, prepare
from mambavision.measure.timing import measure, search_batch_size
from mambavision.models.complexity import count_complexity

CPU = torch.device("cpu")
TINY = "mamba_vision_test_tiny"
QUICK = ["--seconds=0.01", "--device=cpu"]


def subject(run, **changes):
    """Something to be timed that takes the time of `run`."""
    fields = {"name": "fake", "way": "eager", "dtype": "float32", "model": None, "parameters": 1, "macs": 2}
    return Subject(**{**fields, "run": run, "img_size": (2, 2), "device": CPU, **changes})


def test_times_are_those_that_passed():
    naps = iter([0.0] * 6 + [0.01] * 9 + [0.05] * 2 + [0.01] * 1000)
    found = measure(subject(lambda _: time.sleep(next(naps))), 4, seconds=1e-9)
    assert found.passes == 10
    assert 10 <= found.median_ms < 30
    assert found.p90_ms > found.median_ms
    assert found.images_per_second == pytest.approx(4 / (found.median_ms / 1e3))
    assert found.peak_mib is None


def test_throughput_is_of_passes_in_a_row_where_the_host_goes_on(monkeypatch):
    passes = []
    durations = iter([1.0] * 10 + [5.0, 7.0, 5.0, 5.0, 3.0])  # ten that are waited for, five rounds of two

    def timed(_, run):
        run()
        return next(durations)

    monkeypatch.setattr("mambavision.measure.timing._time_on_host", timed)
    found = measure(subject(passes.append, device=torch.device("meta")), 4, seconds=1e-9)
    assert found.median_ms == 1e3
    assert found.images_per_second == pytest.approx(4 / 2.5)
    assert len(passes) == 1 + 5 + 10 + 10


def test_a_batch_that_does_not_fit_is_one_sentence(capsys, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(OutOfMemoryError, match="fake .* with 7 pictures at once does not fit on cpu; .*--batch-size"):
        measure(subject(full), 7)
    monkeypatch.setattr("mambavision.measure.subjects.Subject.pictures", full)
    assert main(["benchmark", TINY, *QUICK]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "does not fit" in captured.err


@pytest.mark.parametrize(("command", "pictures"), [("benchmark", 10**8), ("profile", 10**8), ("benchmark", 10**16)])
def test_more_pictures_than_a_host_holds_are_one_sentence(capsys, command, pictures):
    assert main([command, TINY, f"--batch-size={pictures}", "--device=cpu", "--img-size=1024"]) == 1
    assert (
        f"with {pictures} pictures at once does not fit on cpu; give a smaller --batch-size" in capsys.readouterr().err
    )


def test_one_picture_too_large_to_profile_is_to_be_smaller(capsys):
    assert main(["profile", TINY, "--device=cpu", "--img-size=1000000"]) == 1
    assert "does not fit on cpu; give a smaller --img-size" in capsys.readouterr().err


def test_what_fails_does_not_take_the_rest_along(capsys, monkeypatch):
    def broken(model, **_):
        def run(pictures):
            raise RuntimeError("no compiler\nand pages of reasons")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    assert main(["benchmark", TINY, "--way", "eager", "compile", *QUICK, "--format=json"]) == 1
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert [row["way"] for row in report["rows"]] == ["eager"]
    assert len(report["problems"]) == 1
    assert f"{TINY}, compile, float32, batch 1 could not be measured: RuntimeError: no compiler\n" in captured.err


def test_what_cannot_be_made_does_not_take_the_rest_along(capsys, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no such kernel\nat all")

    monkeypatch.setattr("mambavision.measure.subjects.fuse", broken)
    assert main(["benchmark", TINY, "--way", "eager", "fused", *QUICK, "--format=json"]) == 1
    captured = capsys.readouterr()
    assert [row["way"] for row in json.loads(captured.out)["rows"]] == ["eager"]
    assert f"{TINY}, fused, float32 cannot be made: RuntimeError: no such kernel\n" in captured.err


def test_an_interrupted_run_gives_what_is_done(capsys, monkeypatch, tmp_path):
    def interrupted(subject, batch_size, **how):
        if batch_size == 4:
            raise KeyboardInterrupt
        return measure(subject, batch_size, **how)

    monkeypatch.setattr("mambavision.measure.timing.measure", interrupted)
    plot = tmp_path / "speed.svg"
    assert main(["benchmark", TINY, "--batch-size", "1", "2", "4", "8", f"--plot={plot}", *QUICK]) == 130
    captured = capsys.readouterr()
    assert captured.out.count(" GMACs") == 2
    assert "Stopped; what follows was measured before." in captured.err
    assert plot.exists()
    monkeypatch.setattr("mambavision.measure.subjects.prepare", lambda *_, **__: interrupted(None, 4))
    assert main(["benchmark", TINY, *QUICK]) == 130
    assert capsys.readouterr().out == ""


def test_sizes_that_timms_models_fail_on_leave_the_rest(capsys):
    pytest.importorskip("timm")
    models = ["vit_tiny_patch16_224", "levit_128s", "convnext_atto", "test_vit_relpos"]
    assert main(["benchmark", TINY, *models, "--img-size=8", "--device=cpu", "--seconds=0.01"]) == 1
    captured = capsys.readouterr()
    assert captured.out.count(" GMACs") == 1
    for name in models:
        assert captured.err.count(f"{name} does not take pictures of 8 x 8: ") == 1


def test_attention_with_a_learned_query_is_counted():
    pytest.importorskip("timm")
    assert prepare("vit_base_patch16_siglip_224", way="eager", dtype="float32", device=CPU).macs > 17e9


def test_counting_takes_no_memory_of_the_device():
    """Nor the time of a pass in float32, which a large picture may not fit in."""
    assert prepare(TINY, way="eager", dtype="float32", device=CPU, img_size=(2**16, 2**16)).macs > 10**12


def test_other_errors_of_pytorch_are_no_lack_of_memory():
    def fails(_):
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        measure(subject(fails), 1)


def test_each_batch_size_is_compiled_for_itself(monkeypatch):
    """However many there are: past its limit of recompilations Dynamo would run eagerly, and only its log would say."""
    compiled, compile = [], torch.compile

    def backend(graph, examples):
        compiled.append([tuple(example.shape) for example in examples if example.shape[1:] == (3, 32, 32)])
        return graph

    monkeypatch.setattr(torch, "compile", lambda model, dynamic, **_: compile(model, backend=backend, dynamic=dynamic))
    network = prepare(TINY, way="compile", dtype="float32", device=CPU, img_size=(32, 32))
    for batch_size in range(1, 11):
        measure(network, batch_size, seconds=1e-9)
    assert compiled == [[(batch_size, 3, 32, 32)] for batch_size in range(1, 11)]


def test_attention_of_timm_is_counted_on_every_device():
    """PyTorch's counter knows no fused attention of a CPU."""
    pytest.importorskip("timm")
    counted = prepare("vit_tiny_patch16_224", way="eager", dtype="float32", device=CPU).macs
    dim, tokens, blocks = 192, 197, 12
    products = blocks * tokens * (12 * dim * dim + 2 * tokens * dim) + 196 * 768 * dim + dim * 1000
    assert counted == products


@pytest.mark.parametrize("command", ["benchmark", "profile"])
def test_weights_that_do_not_fit_are_one_sentence(capsys, monkeypatch, command):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("mambavision.measure.subjects.create_model", full)
    assert main([command, TINY, "--device", "cpu"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert TINY in error
    assert "fit on cpu" in error


def test_without_timm_its_models_are_said_to_be_missing(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert main(["benchmark", "resnet50", "--device", "cpu"]) == 2
    assert "timm, which may have it, is missing: pip install timm." in capsys.readouterr().err


def test_what_does_not_run_here_leaves_the_rest(capsys):
    arguments = ["benchmark", TINY, "--way", "optimized-float8", "eager", *QUICK, "--format=json"]
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert [row["way"] for row in json.loads(captured.out)["rows"]] == ["eager"]
    assert "cannot compute in float8 here: cpu is no CUDA GPU" in captured.err
    assert main([*arguments[:3], "optimized-float8", *QUICK]) == 2  # nothing is left
    with pytest.raises(ValueError, match="choose that type, not float32"):
        prepare(TINY, way="optimized-float8", dtype="float32", device=CPU)


def test_the_search_ends_where_doubling_brings_little_or_memory_ends(monkeypatch):
    def speeds(**by_batch):
        def fake(subject, batch_size, *, seconds):
            if f"b{batch_size}" not in by_batch:
                raise OutOfMemoryError("full")
            real = measure(subject, 1, seconds=1e-9)
            return dataclasses.replace(real, batch_size=batch_size, images_per_second=by_batch[f"b{batch_size}"])

        return fake

    nothing = subject(lambda _: None)
    little, full = "larger batches bring less than 3%", "{} pictures at once do not fit on cpu"
    growing = {f"b{2**power}": 2.0**power for power in range(13)}
    for by_batch, best, last, end in (
        ({"b1": 10, "b2": 19, "b4": 30, "b8": 30.5, "b16": 30.2, "b32": 99}, 8, 16, little),
        # a dip is no end
        ({"b1": 313, "b2": 186, "b4": 573, "b8": 891, "b16": 700, "b32": 800, "b64": 9000}, 8, 32, little),
        ({"b1": 10, "b2": 19, "b4": 12}, 2, 4, full.format(8)),
        ({"b1": 10, "b2": 19}, 2, 2, full.format(4)),
        (growing, 4096, 4096, "no larger batch than 4096 is tried"),
    ):
        monkeypatch.setattr(timing, "measure", speeds(**by_batch))
        search = search_batch_size(nothing)
        assert search.best.batch_size == best
        assert search.measured[-1].batch_size == last
        assert len(search.measured) == last.bit_length()
        assert search.end == f"Most images/s with {best} at once; {end}."
    monkeypatch.setattr(timing, "measure", speeds())
    with pytest.raises(OutOfMemoryError):
        search_batch_size(nothing)


def test_a_search_keeps_every_size_and_says_why_it_ended(capsys, monkeypatch):
    real = Subject.pictures

    def pictures(self, batch_size):
        if batch_size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, batch_size)

    monkeypatch.setattr(Subject, "pictures", pictures)
    assert main(["benchmark", TINY, "--batch-size=auto", "--img-size=32", "--format=json", *QUICK]) == 0
    captured = capsys.readouterr()
    assert [row["batch_size"] for row in json.loads(captured.out)["rows"]] == [1, 2]
    assert "batch auto: Most images/s with" in captured.err
    assert "4 pictures at once do not fit on cpu." in " ".join(captured.err.split())


@pytest.mark.parametrize("way", ["eager", "fused"])
def test_every_way_gives_the_same_network(way):
    ready = prepare(TINY, way=way, dtype="float32", device=CPU, img_size=(40, 48))
    assert ready.pictures(3).shape == (3, 3, 40, 48)
    assert ready.macs == count_complexity(create_model(TINY, device="meta"), (40, 48)).macs
    assert ready.parameters == sum(parameter.numel() for parameter in create_model(TINY).parameters())
    assert ready.run(ready.pictures(2)).shape == (2, 10)


def test_models_of_timm_are_counted_and_run():
    ready = prepare("resnet18", way="eager", dtype="bfloat16", device=CPU, img_size=(64, 64))
    assert ready.parameters == 11_689_512
    assert 0.95 < ready.macs / (1.814e9 * (64 / 224) ** 2) < 1.1
    assert ready.run(ready.pictures(1)).dtype == torch.bfloat16


@pytest.mark.parametrize("form", ["table", "json", "csv"])
def test_results_in_every_form(form, capsys):
    arguments = ["--batch-size", "1", "2", "--way", "eager", "fused", "--img-size=32", f"--format={form}"]
    assert main(["benchmark", TINY, *arguments, *QUICK]) == 0
    captured = capsys.readouterr()
    assert "warm-up" in captured.err
    assert torch.__version__ in captured.err
    if form == "json":
        report = json.loads(captured.out)
        assert [(row["way"], row["batch_size"]) for row in report["rows"]] == [
            ("eager", 1),
            ("eager", 2),
            ("fused", 1),
            ("fused", 2),
        ]
        assert report["rows"][0]["img_size"] == [32, 32]
        assert report["torch"] == torch.__version__
        assert report["command"].startswith(f"mambavision benchmark {TINY} --batch-size 1 2 ")
        assert report["problems"] == []
    elif form == "csv":
        rows = list(csv.DictReader(io.StringIO(captured.out)))
        assert len(rows) == 4
        assert float(rows[0]["images_per_second"]) > 0
    else:
        assert re.findall(r" (eager|fused) ", captured.out) == ["eager"] * 2 + ["fused"] * 2
        assert captured.out.count(" GMACs") == 4
        assert max(map(len, captured.out.splitlines())) <= 80


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_numbers_are_whole_however_narrow_the_terminal(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    base = measure(subject(lambda _: None), 1, seconds=1e-9)
    long = {"way": "optimized-float8", "dtype": "float8_e4m3fn", "img_size": (1024, 2048), "batch_size": 4096}
    quick = {"images_per_second": 36214.0, "median_ms": 3.535, "p90_ms": 12.25, "peak_mib": 61828.0, "macs": 4e6}
    rows = [dataclasses.replace(base, model="swin_tiny_patch4_window7_224", **long, **quick), base]
    benchmark._write_table(rows, {"device": "a GPU"})
    output = capsys.readouterr().out
    for number in ("1024x2048", "4096", "36,214", "3.54", "12.25", "61,828"):
        assert number in output
    if columns > 60:  # else names are folded, and what stands below them
        assert "optimized-float8" in output
        assert "0.004" in output
    assert max(map(len, output.splitlines())) <= columns


def test_a_plot_replaces_no_file_unasked(tmp_path, capsys):
    kept = tmp_path / "keep.png"
    kept.write_text("mine")
    assert main(["benchmark", TINY, f"--plot={kept}", *QUICK]) == 2
    assert "exists; --overwrite replaces it, --plot names another" in capsys.readouterr().err
    assert kept.read_text() == "mine"
    assert main(["benchmark", TINY, f"--plot={kept}", "--overwrite", *QUICK]) == 0
    with Image.open(kept) as picture:
        assert min(picture.size) > 300
    (tmp_path / "folder.png").mkdir()
    assert main(["benchmark", TINY, f"--plot={tmp_path / 'folder.png'}", *QUICK]) == 2
    assert "is a folder; name a file" in capsys.readouterr().err


def test_nine_of_ten_passes_keep_the_90th_percentile(monkeypatch):
    durations = iter([1.0] * 9 + [11.0])
    monkeypatch.setattr("mambavision.measure.timing._time_on_host", lambda *_: next(durations))
    found = measure(subject(lambda _: None), 1, seconds=1e-9)
    assert 1e3 <= found.p90_ms <= 2.1e3


def test_the_plot_is_a_picture(tmp_path, capsys):
    assert main(["benchmark", TINY, "--batch-size", "1", "2", f"--plot={tmp_path / 'speed.PNG'}", *QUICK]) == 0
    with Image.open(tmp_path / "speed.PNG") as picture:
        assert min(picture.size) > 300
    assert "speed.PNG" in capsys.readouterr().err


def test_the_plot_has_a_tick_for_each_batch_size_and_room_for_its_legend(tmp_path, monkeypatch):
    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *path, **how: (drawn.append(figure), save(figure, *path, **how))
    )
    base = measure(subject(lambda _: None), 1, seconds=1e-9)
    rows = [
        dataclasses.replace(base, model=f"a_network_with_a_long_name_{number}", batch_size=size, images_per_second=99.0)
        for number in range(28)
        for size in (100, 3, 100)
    ]
    plot_speeds(rows, tmp_path / "speed.png", title="a device " * 20)
    (figure,) = drawn
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["3", "100"]
    assert len({(line.get_color(), line.get_marker()) for line in axes.lines}) == 28
    assert all(len(line.get_xdata()) == 2 for line in axes.lines)
    (legend,) = figure.legends
    assert "2 px, eager, float32" in legend.get_texts()[0].get_text()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    assert not legend.get_window_extent(renderer).overlaps(axes.get_tightbbox(renderer))
    assert axes.get_window_extent(renderer).height > 3 * figure.dpi


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mamba_vision_tt"], "mamba_vision_T"),
        (["no_such_net"], "timm has no such model either"),
        (
            ["maxvit_rmlp_pico_rw_256", "--img-size=200"],
            "maxvit_rmlp_pico_rw_256 does not take pictures of 200 x 200: ",
        ),
        (["resnet18", "--way=fused"], "our own networks alone"),
        ([TINY, "no_such_net"], "timm has no such model either"),
        ([TINY, f"--batch-size={2**64}"], "less than 2^63"),
        ([TINY, "--plot=speed.doc"], ".png"),
        ([TINY, "--plot=nowhere/speed.png"], "no folder nowhere"),
        ([TINY, "--seconds=0"], "--seconds must be positive"),
        ([TINY, "--batch-size=0"], "at least 1"),
        ([TINY, "--device=abacus"], "abacus"),
    ],
)
def test_wrong_use_is_said(arguments, message, capsys):
    assert main(["benchmark", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_parts_add_up_and_the_slow_one_comes_first(monkeypatch):
    model = create_model(TINY, img_size=32).eval()
    forward = MambaVisionMixer.forward

    def slow(self, x):
        time.sleep(0.1)  # longer than a busy machine holds up anything else
        return forward(self, x)

    monkeypatch.setattr(MambaVisionMixer, "forward", slow)
    parts = profile_parts(model, torch.randn(1, 3, 32, 32), passes=3)
    assert parts[0].name == "scan mixers"
    assert parts[0].milliseconds >= 200
    assert parts[0].calls == 2
    assert {part.name for part in parts} >= {"stem", "attention", "MLPs", REST}
    assert sum(part.share for part in parts) == pytest.approx(1)
    assert not any(module._forward_hooks for module in model.modules())


def test_operations_are_those_that_ran():
    shares = profile_operations(nn.Conv2d(64, 64, 3), torch.randn(1, 64, 128, 128), top=3)
    assert len(shares) == 3
    assert "conv" in shares[0].name
    assert shares[0].milliseconds >= shares[-1].milliseconds


@pytest.mark.parametrize("form", ["table", "json"])
def test_profile_prints_parts_and_operations(form, capsys):
    assert main(["profile", TINY, "--top=4", "--device=cpu", f"--format={form}"]) == 0
    text = capsys.readouterr().out
    if form == "json":
        report = json.loads(text)
        assert len(report["operations"]) == 4
        assert report["shape"] == [1, 3, 64, 64]
        assert torch.__version__.startswith(report["torch"])  # but for the build
    else:
        assert "scan mixers" in text
        assert "aten::" in text
    assert main(["profile", "mamba_vision_tt"]) == 2
