"""Where the network looked: the maps against the formulae, the picture against what it was drawn from."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from mambavision import Predictor, create_model
from mambavision.cli import main
from mambavision.inference import optimize
from mambavision.inference.explain import AttentionMap, explain, find_class
from mambavision.inference.fuse import fuse
from mambavision.inference.images import ImageError, read_image
from mambavision.inference.overlay import PANEL, overlay
from mambavision.inference.picture_files import SAMPLES
from mambavision.inference.preprocess import build_transform
from mambavision.layers.window import window_partition
from mambavision.weights import save_checkpoint

CAT = SAMPLES / "cat.jpg"
NAMES = ("tabby", "Siamese", "tiger cat", "lynx", "puma")
ODD = (52, 75)  # maps of 4 x 5 and 2 x 3 cells, windows of 4 and 2


@pytest.fixture(scope="module")
def predictor():
    torch.manual_seed(0)
    network = create_model("mamba_vision_test_tiny", class_names=NAMES, layer_scale=0.5)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if "norm" in name and tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)  # a norm that is not the identity
        torch.nn.init.normal_(network.head.weight)
    return Predictor(network)


@pytest.fixture(scope="module")
def checkpoint(predictor, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_checkpoint(path, predictor.model.state_dict(), predictor.config)
    return str(path)


# ---- class activation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [None, ODD, (33, 64), (1, 1)])
@pytest.mark.parametrize("folded", [False, True])
def test_the_mean_of_the_map_is_the_logit_of_its_class(predictor, size, folded):
    network = fuse(predictor.model) if folded else predictor.model
    explanation = explain(Predictor(network), CAT, target="lynx", img_size=size)
    settings = predictor.config.preprocessing
    inputs = build_transform(type(settings)(**{**vars(settings), "img_size": size or settings.img_size}))
    with torch.no_grad():
        logits = predictor.model(inputs(read_image(CAT))[None])[0]
    height, width = size or settings.img_size
    assert explanation.activation.shape == (-(-height // 32), -(-width // 32))
    torch.testing.assert_close(explanation.activation.mean(), logits[3], rtol=1e-4, atol=1e-5)
    assert (explanation.label, explanation.index) == ("lynx", 3)
    assert explanation.probability == pytest.approx(float(logits.softmax(-1)[3]), rel=1e-4)


def test_a_cell_of_the_map_is_what_the_head_makes_of_it(predictor):
    explanation = explain(predictor, CAT, target=1)
    with torch.no_grad():
        cells = predictor.model.forward_features(build_transform(predictor.config.preprocessing)(read_image(CAT))[None])
        expected = predictor.model.head(cells[0, :, 1, 0])[1]
    torch.testing.assert_close(explanation.activation[1, 0], expected)


def test_without_a_class_it_is_the_likeliest(predictor):
    explanation = explain(predictor, CAT)
    (prediction,) = predictor([CAT], top_k=3)
    assert explanation.label == explanation.prediction.labels[0] == prediction.labels[0]
    assert explanation.prediction.labels == prediction.labels
    assert explanation.probability == pytest.approx(prediction.probabilities[0], rel=1e-5)


def test_only_an_average_has_a_class_activation_map():
    timm = pytest.importorskip("timm")
    import mambavision.integrations.timm  # noqa: F401  (registers)

    def of_timm(pool):
        return Predictor(timm.create_model("mamba_vision_nano_32", global_pool=pool))

    assert explain(of_timm("avg"), CAT).activation.isfinite().all()
    for pool in ("max", "catavgmax"):
        with pytest.raises(ValueError, match=f"averages its last map, not '{pool}'"):
            explain(of_timm(pool), CAT)


def test_classes_by_name_and_by_place():
    assert [find_class(target, NAMES) for target in ("Tiger Cat", "siamese", "4", 0)] == [2, 1, 4, 0]
    with pytest.raises(ValueError, match=r"No class is called 'tigre cat'; the nearest names are tiger cat"):
        find_class("tigre cat", NAMES)
    with pytest.raises(ValueError, match="the first names are tabby, Siamese, tiger cat"):
        find_class("xylophone", NAMES)
    for target in (5, "5", -1):
        with pytest.raises(ValueError, match=f"There is no class {target}; the classes are 0 to 4"):
            find_class(target, NAMES)


# ---- attention -------------------------------------------------------------------------------------------------------


def test_attention_of_every_block_that_attends_is_there_and_the_network_is_left_as_it_was(predictor):
    explanation = explain(predictor, CAT, img_size=ODD)
    assert [block.name for block in explanation.attention] == ["levels.2.blocks.1", "levels.3.blocks.1"]
    for block, (rows, columns, length) in zip(explanation.attention, [(4, 5, 16), (2, 3, 4)], strict=True):
        assert (block.rows, block.columns) == (rows, columns)
        assert block.weights.shape == (2, length, length)
        torch.testing.assert_close(block.weights.sum(-1), torch.ones(2, length))
        assert block.received().shape == (rows, columns)
    attention = predictor.model.levels[2].blocks[1].mixer
    assert attention.fused_attn
    assert not attention.attn_drop._forward_hooks


def test_weights_are_those_of_the_formula(predictor):
    explanation = explain(predictor, CAT)
    attention = predictor.model.levels[3].blocks[1].mixer
    caught = []
    handle = attention.register_forward_hook(lambda _, inputs, __: caught.append(inputs[0]))
    try:
        predictor([CAT])
    finally:
        handle.remove()
    tokens = caught[0].double()  # (windows, length, channels)
    dim, heads = tokens.shape[-1], attention.num_heads
    q, k, _ = (tokens @ attention.qkv.weight.double().T + attention.qkv.bias.double()).split(dim, dim=-1)
    per_head = [
        (q_head @ k_head.transpose(-2, -1) / (dim // heads) ** 0.5).softmax(-1)
        for q_head, k_head in zip(q.split(dim // heads, -1), k.split(dim // heads, -1), strict=True)
    ]
    expected = torch.stack(per_head).mean(0).float().detach()
    torch.testing.assert_close(explanation.attention[-1].weights, expected, rtol=1e-4, atol=1e-6)


@pytest.fixture
def known():
    """Attention over a map of 3 x 5 tokens in windows of 2: two by three windows that reach beyond it."""
    weights = torch.rand(6, 4, 4).softmax(-1)
    return AttentionMap(level=2, block=0, window=2, rows=3, columns=5, weights=weights)


def test_received_attention_is_stitched_without_the_padding(known):
    received = known.received()
    for row in range(3):
        for column in range(5):
            window, key = row // 2 * 3 + column // 2, row % 2 * 2 + column % 2
            queries = [q for q in range(4) if row // 2 * 2 + q // 2 < 3 and column // 2 * 2 + q % 2 < 5]
            expected = 4 * np.mean([known.weights[window, query, key].item() for query in queries])
            assert received[row, column].item() == pytest.approx(expected, rel=1e-5)


def test_sent_attention_is_one_row_of_one_window(known):
    sent = known.sent(0.5, 0.99)  # row 2, column 2: the first token of the window in the middle below
    expected = torch.zeros(3, 5)
    expected[2, 2:4] = 4 * known.weights[4, 0, :2]
    torch.testing.assert_close(sent, expected)
    assert known.sent(1, 1)[2, 4] == 4 * known.weights[5, 0, 0]
    with pytest.raises(ValueError, match="must lie in 0..1"):
        known.sent(1.1, 0)


def test_even_attention_is_one_everywhere():
    padded = AttentionMap(level=2, block=0, window=4, rows=3, columns=9, weights=torch.full((3, 16, 16), 1 / 16))
    torch.testing.assert_close(padded.received(), torch.ones(3, 9))
    torch.testing.assert_close(window_partition(padded.sent(0, 0)[None, None], 4).sum(), torch.tensor(12.0))


def test_a_network_that_only_scans_has_its_activation_alone():
    network = create_model("mamba_vision_test_tiny", mixer_order="mamba_only")
    explanation = explain(Predictor(network), CAT)
    assert explanation.attention == ()
    assert overlay(explanation).width < 3 * PANEL
    with pytest.raises(ValueError, match="No block of level 2 attends"):
        explanation.attention_of(2)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["mamba_vision_T2", "mamba_vision_S", "mamba_vision_B", "mamba_vision_nano_32"])
@pytest.mark.parametrize("size", [None, (157, 301)])
def test_real_variants_at_their_own_size_and_an_odd_one(variant, size):
    network = create_model(variant).eval()
    explanation = explain(Predictor(network), CAT, img_size=size)
    config = network.config
    rows, columns = (-(-side // config.reductions[3]) for side in size or config.preprocessing.img_size)
    assert explanation.activation.shape == (rows, columns)
    assert len(explanation.attention) == config.depths[2] // 2 + config.depths[3] // 2
    for block in explanation.attention:
        reduction = config.reductions[block.level]
        height, width = size or config.preprocessing.img_size
        assert block.received().shape == (-(-height // reduction), -(-width // reduction))
        torch.testing.assert_close(block.weights.sum(-1), torch.ones(block.weights.shape[:2]))
    assert overlay(explanation, per_block=True).width > 3 * PANEL


# ---- the picture -----------------------------------------------------------------------------------------------------


def test_the_overlay_is_hot_where_the_activation_is(predictor):
    """Red over the cell with the largest value, blue over the smallest, at their places in the second panel."""
    explanation = explain(predictor, Image.new("RGB", (64, 64), "grey"))
    values = torch.tensor([[0.0, 0.5], [0.5, 1.0]])
    sheet = np.asarray(overlay(type(explanation)(**{**vars(explanation), "activation": values})), int)
    panel = sheet[68 : 68 + PANEL, 16 + PANEL + 16 :][:, :PANEL]
    cold, hot = panel[10, 10], panel[-10, -10]
    assert hot[0] > hot[2] + 50
    assert cold[2] > cold[0] + 30


def test_panels_of_every_block_and_of_a_point(predictor):
    explanation = explain(predictor, CAT, img_size=ODD)
    mean, blocks = overlay(explanation), overlay(explanation, per_block=True)
    assert mean.size == blocks.size  # one attending block a level
    assert overlay(explanation, point=(0.5, 0.5)).tobytes() != mean.tobytes()
    with pytest.raises(ValueError, match="must lie in 0..1"):
        overlay(explanation, point=(2, 0))


def test_the_input_is_told_as_the_option_takes_it(predictor, monkeypatch):
    titles = []
    monkeypatch.setattr(sys.modules[overlay.__module__], "_sheet", lambda _, panels: titles.extend(dict(panels)))
    overlay(explain(predictor, CAT, img_size=(32, 96)))
    assert titles[0] == "Input, 32 x 96 px"


def test_one_channel_half_precision_and_long_names():
    network = create_model("mamba_vision_test_tiny", in_chans=1, dtype=torch.bfloat16, class_names=["x" * 300, "\x1b"])
    explanation = explain(Predictor(network), CAT.read_bytes(), target=0)
    assert explanation.source == "the picture"
    assert explanation.seen.mode == "L"
    assert overlay(explanation, per_block=True).mode == "RGB"


def test_the_shown_picture_is_the_same_part_as_the_seen_one():
    explanation = explain(Predictor(), SAMPLES / "horse.jpg")
    assert explanation.seen.size == (32, 32)
    assert explanation.shown.size == (320, 320)
    smaller = np.asarray(explanation.shown.resize((32, 32), Image.Resampling.BOX), float)
    assert np.abs(smaller - np.asarray(explanation.seen, float)).mean() < 4


def test_a_bad_picture_is_an_error(predictor, tmp_path):
    with pytest.raises(ImageError, match="does not exist"):
        explain(predictor, tmp_path / "missing.jpg")


def test_an_output_that_is_not_finite_is_an_error():
    network = create_model("mamba_vision_test_tiny")
    torch.nn.init.constant_(network.head.bias, float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        explain(Predictor(network), CAT)


@pytest.mark.gpu
def test_an_optimised_network_forms_no_attention():
    network = optimize(create_model("mamba_vision_nano_32", pretrained=True, device="cuda"))
    with pytest.raises(ValueError, match="optimised for a GPU forms no attention"):
        explain(Predictor(network, device="cuda"), CAT)


# ---- the command -----------------------------------------------------------------------------------------------------


def run(capsys, *arguments):
    code = main(["explain", *map(str, arguments)])
    output = capsys.readouterr()
    return code, output.out, output.err


def test_overlays_are_written_and_one_bad_picture_does_not_stop_the_rest(capsys, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cut.jpg").write_bytes(CAT.read_bytes()[:5000])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "cat.png").write_bytes(CAT.read_bytes())
    code, out, err = run(capsys, "cut.jpg", CAT, "other", "gone/*.jpg", "--checkpoint", checkpoint, "--class", "puma")
    assert code == 1
    assert len(err.splitlines()) == 2
    assert "cut.jpg is broken" in err
    assert [line.rpartition(", ")[2] for line in out.splitlines()] == ["cat.explained.png", "cat-2.explained.png"]
    assert all(": puma " in line for line in out.splitlines())  # the class that was asked for, not the likeliest
    assert {path.name for path in tmp_path.iterdir()} == {
        "cut.jpg",
        "other",
        "cat.explained.png",
        "cat-2.explained.png",
    }
    with Image.open("cat.explained.png") as image:
        assert image.format == "PNG"


def test_numbered_names_avoid_those_that_are_taken(capsys, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a/cat.jpg", "a/cat-2.jpg", "b/cat.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(CAT.read_bytes())
    assert run(capsys, "a/cat.jpg", "a/cat-2.jpg", "b/cat.jpg", "--checkpoint", checkpoint)[0] == 0
    written = {path.name for path in tmp_path.glob("*.png")}
    assert written == {"cat.explained.png", "cat-2.explained.png", "cat-3.explained.png"}


def test_nothing_is_overwritten_unasked(capsys, checkpoint, tmp_path):
    target = tmp_path / "deep" / "cat.png"
    assert run(capsys, CAT, "-o", target, "--checkpoint", checkpoint)[0] == 0
    before = target.read_bytes()
    code, out, err = run(capsys, CAT, "-o", target, "--checkpoint", checkpoint, "--from", "0.2,0.8")
    assert (code, out) == (2, "")
    assert err == f"{target} exists; --overwrite replaces it, --output names another.\n"
    assert target.read_bytes() == before
    assert run(capsys, CAT, "-o", target, "--checkpoint", checkpoint, "--from", "0.2,0.8", "--overwrite")[0] == 0
    assert target.read_bytes() != before


def test_one_overlay_that_is_there_does_not_stop_the_rest(capsys, checkpoint, tmp_path):
    (tmp_path / "cut.jpg").write_bytes(CAT.read_bytes()[:5000])
    (tmp_path / "cat.explained.png").write_bytes(b"the old one")
    pictures = [CAT, tmp_path / "cut.jpg", SAMPLES / "dog.jpg"]
    code, out, err = run(capsys, *pictures, "-o", tmp_path, "--checkpoint", checkpoint)
    assert code == 2  # before the 1 of a picture that cannot be read
    assert [line.rpartition(": ")[0] for line in out.splitlines()] == [str(SAMPLES / "dog.jpg")]
    assert len(err.splitlines()) == 2
    assert (tmp_path / "cat.explained.png").read_bytes() == b"the old one"
    assert (tmp_path / "dog.explained.png").exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "no pictures given"),
        ([CAT, "--class", "zebra"], "No class is called 'zebra'"),
        ([CAT, "--class", "17"], "There is no class 17; the classes are 0 to 4."),
        ([CAT, CAT, "-o", "one.png"], "must be a folder for 2 pictures"),
        ([CAT, "-o", "one.jpg"], "must be a .png file or a folder"),
        ([CAT, "--from", "0.5"], "must be X,Y"),
        ([CAT, "--from", "0.5,7"], "must lie in 0..1"),
        ([CAT, "--device", "abacus"], "abacus"),
        ([CAT, "--img-size", "0"], "at least 1"),
        (
            [CAT, "--img-size", "64x20000"],
            "mambavision: An image size of 64 x 20000 px is too large; choose one of at most 8192 px a side.",
        ),
    ],
)
def test_wrong_use(capsys, checkpoint, arguments, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *arguments, "--checkpoint", checkpoint)
    assert (code, out) == (2, "")
    assert reason in err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []
