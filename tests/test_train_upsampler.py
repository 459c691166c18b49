"""The example that trains: upsamplers, photographs, measures, interrupted runs, the command, a user's mistakes."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from dlu_triton import _launch  # noqa: E402

ROOT = Path(__file__).parents[1]
FILE = ROOT / "examples" / "train_upsampler.py"
METHODS = ("nearest", "bilinear", "carafe", "dysample", "dlu")
TIMES = ("training_seconds", "upsampler_milliseconds", "network_milliseconds")


def load(name):
    spec = importlib.util.spec_from_file_location(name, FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


example = load("_train_upsampler")


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    """CPU tensors take the eager path here, as they do for a user; one thread, as others wait for each other."""
    monkeypatch.setattr(_launch, "INTERPRETED", False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pictures():
    return example.Pictures.load()


@pytest.fixture
def short(monkeypatch):
    """Runs of few steps, with one small photograph to measure and a checkpoint every three steps."""
    monkeypatch.setattr(example, "HELD_OUT", ("chelsea.png",))
    monkeypatch.setattr(example, "CHECKPOINT_STEPS", 3)
    monkeypatch.setattr(example, "milliseconds", lambda module, pixels: 1.0)


@pytest.fixture
def error(capsys):
    """Run the example, which must fail: the one line on stderr."""

    def run(*arguments):
        capsys.readouterr()
        assert example.main([*map(str, arguments), "--device", "cpu"]) == 1
        message = re.split(r"[\r\n]", capsys.readouterr().err.strip())[-1]
        assert message.startswith("train_upsampler: error: ")
        return message

    return run


class Silent:
    def update(self, steps=1):
        pass


def setup(pictures, steps, out=Path("nowhere")):
    return example.Setup(out, torch.device("cpu"), pictures, {"settings": {"steps": steps}, "machine": {}})


# ---------------------------------------------------------------------------------------------------------------
# Upsamplers
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", (2, 4, 8))
@pytest.mark.parametrize("method", METHODS)
def test_costs_are_those_of_the_modules(method, scale):
    """FLOPs as PyTorch counts them, which leaves out biases and the samples of DySample and bilinear interpolation."""
    module = example.upsampler(method, scale).to("meta")
    features = torch.randn(1, 32, 3, 4, device="meta")
    with FlopCounterMode(display=False) as counter:
        assert module(features).shape == (1, 32, 3 * scale, 4 * scale)
    counted = counter.get_total_flops() // 12
    biases = sum(2 * layer.bias.numel() for layer in module.modules() if isinstance(layer, nn.Conv2d))
    weighted = 7 * 32 if method in ("dysample", "bilinear") else 0
    parameters, flops = example.cost(method, scale)
    assert parameters == sum(parameter.numel() for parameter in module.parameters())
    assert flops == counted + biases + weighted * scale**2


def test_parameters_by_hand():
    assert [example.cost(method, 2)[0] for method in METHODS] == [0, 0, 15028, 1056, 5313]
    assert [example.cost(method, 8)[0] for method in METHODS] == [0, 0, 232528, 16896, 22713]


@pytest.mark.parametrize("scale", (2, 4))
def test_dysample_without_offsets_is_bilinear(scale):
    module = example.DySample(8, scale)
    nn.init.zeros_(module.offset.weight)
    features = torch.randn(2, 8, 5, 6)
    torch.testing.assert_close(module(features), F.interpolate(features, scale_factor=scale, mode="bilinear"))


@pytest.mark.parametrize("axis", (0, 1), ids="xy")
def test_dysample_offsets(axis):
    """A group whose offsets are one source pixel, and one with another in every output of a source pixel."""
    scale, features = 2, torch.randn(2, 8, 5, 6)
    module = example.DySample(8, scale)
    nn.init.zeros_(module.offset.weight)
    bias = torch.zeros(4, 2, scale, scale)
    bias[1, axis] = 4  # times 0.25
    bias[2, axis, 1, 0] = 8
    module.offset.bias.data = bias.flatten()
    plain = F.interpolate(features, scale_factor=scale, mode="bilinear")
    shifts = torch.tensor([(0, -2), (-2, 0)][axis])  # of outputs, for a source pixel
    expected = plain.clone()
    expected[:, 2:4] = plain[:, 2:4].roll(shifts.tolist(), (2, 3))
    expected[:, 4:6, 1::2, ::2] = plain[:, 4:6].roll((2 * shifts).tolist(), (2, 3))[:, :, 1::2, ::2]
    inside = (..., slice(0, 5), slice(0, 7))  # what does not come from beyond the border
    torch.testing.assert_close(module(features)[inside], expected[inside])


# ---------------------------------------------------------------------------------------------------------------
# Photographs
# ---------------------------------------------------------------------------------------------------------------


def test_no_scene_is_on_both_sides(pictures):
    training = [name for scene in example.TRAINING for name in scene]
    assert not set(training) & set(example.HELD_OUT)
    assert [[*scene] for scene in example.TRAINING if any("motorcycle" in name for name in scene)] == [
        ["motorcycle_left.png", "motorcycle_right.png"]
    ]
    assert not any("motorcycle" in name for name in example.HELD_OUT)
    everything = [picture for scene in pictures.training for picture in scene] + [
        example.read(name) for name in example.HELD_OUT
    ]
    for picture in everything:
        assert picture.shape[0] == 3
        assert 0 <= picture.min() < 0.1 < 0.9 < picture.max() <= 1
        assert (picture[0] - picture[2]).abs().mean() > 0.02, "no colour"
    for index, one in enumerate(everything):
        for other in everything[:index]:
            size = [min(sides) for sides in zip(one.shape, other.shape, strict=True)]
            window = tuple(slice(side) for side in size)
            assert (one[window] - other[window]).abs().mean() > 0.03, "twice the same"


def test_tiles():
    picture = torch.rand(3, 300, 451)
    tiles = example.tiles(picture)
    assert tiles.shape == (2 * 3, 3, 128, 128)
    assert torch.equal(tiles[4], picture[:, 22 + 128 : 22 + 256, 33 + 128 : 33 + 256])


def test_training_crops_are_of_the_training_photographs():
    """Scenes are equally likely, whatever the number of their pictures, and the noise is what it should be."""
    scenes = [[torch.full((3, 70, 80), 0.1)], [torch.full((3, 64, 64), 0.5), torch.full((3, 100, 65), 0.9)]]
    generator = torch.Generator().manual_seed(0)
    batches = [example.Pictures(scenes, {}).draw(generator) for _ in range(200)]
    noise, clean = (torch.cat(each) for each in zip(*batches, strict=True))
    assert clean.shape == (200 * example.BATCH, 3, 64, 64)
    shares = [(clean[:, 0, 0, 0] == value).float().mean().item() for value in (0.1, 0.5, 0.9)]
    assert shares == pytest.approx([0.5, 0.25, 0.25], abs=0.07)
    assert (noise - clean).std().item() == pytest.approx(example.NOISE, rel=0.01)
    assert (noise - clean).mean().item() == pytest.approx(0, abs=1e-3)


def test_all_methods_start_and_learn_alike(pictures, monkeypatch):
    """The same first encoder and head, and the same crops, which another seed changes."""
    seen = {}
    draw = example.Pictures.draw

    def record(self, generator):
        batch = draw(self, generator)
        seen.setdefault(name, []).append(batch)
        return batch

    first = {}
    monkeypatch.setattr(example.Pictures, "draw", record)
    for name, job in {m: example.Job(m, 4, 3) for m in METHODS}.items() | {"other": example.Job("dlu", 4, 4)}.items():
        state = example.train(job, setup(pictures, 0), Silent())[0].state_dict()
        first[name] = [value for key, value in state.items() if not key.startswith("upsampler")]
        example.train(job, setup(pictures, 2), Silent())

    def same(one, other):
        return all(torch.equal(*pair) for pair in zip(one, other, strict=True))

    for method in METHODS[1:]:
        assert same(first["nearest"], first[method])
        for one, other in zip(seen["nearest"], seen[method], strict=True):
            assert same(one, other)
    assert not same(first["dlu"], first["other"])
    assert not same(seen["dlu"][0], seen["other"][0])


# ---------------------------------------------------------------------------------------------------------------
# Training and measures
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_training_learns(pictures, method):
    """One batch over and over: the loss falls, and every weight takes part."""
    batch = pictures.draw(torch.Generator().manual_seed(0))

    class One:
        def draw(self, generator):
            return batch

    job, steps = example.Job(method, 4, 0), 40
    before = example.train(job, setup(One(), 0), Silent())[0].state_dict()
    network, losses, seconds = example.train(job, setup(One(), steps), Silent())
    assert losses[-1] < 0.4 * losses[0]
    assert seconds > 0
    for name, value in network.state_dict().items():
        assert not torch.equal(before[name], value), name


def test_rate():
    rates = [example.rate(step, 100) for step in range(100)]
    assert max(rates) == rates[9] == example.LEARNING_RATE
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[0] > 0
    assert rates[-1] == pytest.approx(0, abs=1e-9)


class Unchanged(nn.Module):
    """In place of a network, one that returns its input."""

    def __init__(self):
        super().__init__()
        self.encoder = self.upsampler = nn.Identity()

    def forward(self, pictures):
        return pictures


def test_measures(short, monkeypatch):
    grey = torch.full((2, 3, 128, 128), 0.5)
    tiles = example.tiles(example.read("chelsea.png"))
    added = torch.zeros(2, 3, 128, 128)
    added[0] += 0.1  # 20 dB
    added[1] += 0.01  # 40 dB
    others = setup(example.Pictures([], {"grey": grey, "same": tiles}), 0)
    monkeypatch.setattr(example, "noisy", lambda clean, _: clean + (added if len(clean) == 2 else 1e-6))
    found = example.evaluate(Unchanged(), others)
    assert found["psnr"]["grey"] == pytest.approx(30, abs=1e-3)
    assert found["ssim"]["same"] == pytest.approx(1, abs=1e-3)
    assert found["parameters"] == 0
    # Of constant pictures only the luminance counts: (2ab + c) / (a² + b² + c).
    one, other = ((2 * 0.5 * b + 1e-4) / (0.25 + b * b + 1e-4) for b in (0.6, 0.51))
    assert found["ssim"]["grey"] == pytest.approx((one + other) / 2, abs=1e-3)


def test_noise_of_the_measures_is_always_the_same(short, pictures):
    one, other = (example.evaluate(Unchanged(), setup(pictures, 0)) for _ in range(2))
    assert one == other
    assert one["psnr"]["chelsea.png"] == pytest.approx(20, abs=0.2)  # the others have pixels that are clamped


def made_up(method, seed, *psnr, scale=2):
    names = ("a", "b", "c", "d")
    values = dict(zip(names, psnr, strict=True))
    return {
        "method": method,
        "scale": scale,
        "seed": seed,
        "psnr": values,
        "ssim": {name: value / 100 for name, value in values.items()},
        "parameters": example.cost(method, scale)[0],
        "training_seconds": 10 + seed,
        "upsampler_milliseconds": 1.234 + seed,
        "network_milliseconds": 5.0,
    }


def results():
    """DLU beside others that are clearly worse, clearly better, the same, and better on some pictures."""
    runs = []
    for seed in range(3):
        base = [20 + seed / 10, 25, 30, 35 - seed / 10]
        runs.append(made_up("nearest", seed, *(value - 0.5 for value in base)))
        runs.append(made_up("bilinear", seed, *(value + 0.02 for value in base)))
        runs.append(made_up("carafe", seed, *base))
        runs.append(made_up("dysample", seed, base[0] + 1, base[1] + 1, base[2] - 0.2, base[3] - 0.1))
        runs.append(made_up("dlu", seed, *base))
    return runs


def figures(runs=None):
    place = {"device": "Made-up CPU", "threads": 3, "torch": "5.6", "triton": "7.8", "python": "9.10"}
    key = {
        "settings": {"steps": 12, "held_out": ["a", "b", "c", "d"]},
        "machine": place | {"commit": "0123456789abcdef0123456789abcdef01234567"},
    }
    return example.summarise(runs or results(), key, [0, 1, 2])


def test_ties():
    found = example.compare(results(), [0, 1, 2])
    assert {name: each["verdict"] for name, each in found.items()} == {
        "nearest": "better",
        "bilinear": "worse",
        "carafe": "tie",
        "dysample": "tie",
    }
    assert found["nearest"]["mean"] == pytest.approx(0.5)
    assert found["nearest"]["low"] == pytest.approx(found["nearest"]["high"])
    assert found["dysample"]["mean"] == pytest.approx(-0.425)
    assert found["dysample"]["low"] < -0.425 < 0 < found["dysample"]["high"]
    assert example.verdicts(figures()) == [
        f"2{example.TIMES}: DLU is better than nearest; ties with CARAFE and DySample; is worse than bilinear."
    ]


def test_seeds_and_pictures_both_vary():
    """A gain of one seed of three, or of one picture of four, may be chance; 0.1 dB on all of them is none."""
    for gains in ([[3] * 4, [0] * 4, [0] * 4], [[3, 0, 0, 0]] * 3):
        runs = [made_up("nearest", seed, 20, 20, 20, 20) for seed in range(3)]
        runs += [made_up("dlu", seed, *(20 + gain for gain in row)) for seed, row in enumerate(gains)]
        assert example.compare(runs, [0, 1, 2])["nearest"]["verdict"] == "tie"
    runs = [made_up("nearest", seed, 20, 25, 30, 35) for seed in range(3)]
    runs += [made_up("dlu", seed, 20.1, 25.2, 30.1, 35.1) for seed in range(3)]
    assert example.compare(runs, [0, 1, 2])["nearest"]["verdict"] == "better"


def test_resolution():
    """What the table does not show is no difference."""
    runs = [made_up("nearest", seed, 20, 25, 30, 35) for seed in range(3)]
    runs += [made_up("dlu", seed, 20.004, 25.004, 30.004, 35.004) for seed in range(3)]
    assert example.compare(runs, [0, 1, 2])["nearest"]["verdict"] == "tie"


def test_table():
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in example.table(figures()).splitlines()]
    titles, _, *rows = rows
    cells = {row[1]: dict(zip(titles, row, strict=True)) for row in rows}
    assert list(cells) == list(example.TITLES.values())
    assert cells["DLU"] == {
        "scale": f"2{example.TIMES}",
        "upsampler": "DLU",
        "parameters": "5,313",
        "FLOPs per output pixel": "4,432",
        "PSNR, dB": "27.50 ± 0.00",
        "SSIM": "0.275 ± 0.000",
        "DLU over it, dB (95%)": "",
        "training, s": "10",
        "upsampler, ms": "1.23",
    }
    assert cells["nearest"]["DLU over it, dB (95%)"] == "+0.50 (+0.50 to +0.50)"
    assert cells["bilinear"]["DLU over it, dB (95%)"].startswith(f"{example.MINUS}0.02 ")
    runs = [made_up("nearest", seed, *[20 + seed] * 4) for seed in range(3)]
    assert "| 21.00 ± 1.00 |" in example.table(figures(runs))


def test_document():
    text = example.document(figures())
    assert example.table(figures()) in text
    assert "Made-up CPU, threads: 3, torch 5.6, Triton 7.8, Python 9.10, commit 0123456789ab." in text
    assert f"| 2{example.TIMES} | DLU | 20.10 | 25.00 | 30.00 | 34.90 |" in text


@pytest.mark.parametrize(
    ("name", "scales", "methods", "steps"),
    (("train", (2, 4, 8), METHODS, example.STEPS), ("train-long", (4,), ("carafe", "dlu"), 4 * example.STEPS)),
    ids=("train", "train-long"),
)
def test_committed_results(name, scales, methods, steps):
    """Their summary is that of their runs, every run is there, and costs are those of the modules."""
    found = json.loads(ROOT.joinpath("bench", "results", f"{name}.json").read_text())
    key = {kind: found[kind] for kind in ("settings", "machine")}
    again = example.summarise(found["runs"], key, found["seeds"])
    assert found["methods"] == [pytest.approx(row) for row in again["methods"]]
    assert found["dlu_over"] == {
        scale: {method: pytest.approx(gain) for method, gain in gains.items()}
        for scale, gains in again["dlu_over"].items()
    }
    runs = {(run["scale"], run["method"], run["seed"]) for run in found["runs"]}
    assert len(runs) == len(found["runs"])
    assert runs == {(scale, method, seed) for scale in scales for method in methods for seed in found["seeds"]}
    assert len({run["weights"] for run in found["runs"]}) == len(runs), "two runs are one"
    for run in found["runs"]:
        assert run["parameters"] == example.cost(run["method"], run["scale"])[0]
        assert list(run["psnr"]) == list(example.HELD_OUT)
    assert found["settings"] == example.settings(steps)


def test_plot():
    runs = results() + [made_up(method, seed, 10, 20, 30, 41, scale=4) for method in METHODS for seed in range(3)]
    sheet = example.draw(figures(runs))
    first, second = sheet.axes
    assert [axes.get_title() for axes in sheet.axes] == [f"2{example.TIMES}", f"4{example.TIMES}"]
    points = {container.get_label(): container.lines[0].get_xydata().tolist() for container in first.containers}
    assert list(points) == list(example.TITLES.values())
    assert points["DLU"] == [[5313, pytest.approx(27.5)]]
    assert points["nearest"] == [[0, pytest.approx(27.0)]]
    assert second.containers[-1].lines[0].get_xydata().tolist() == [[example.cost("dlu", 4)[0], 25.25]]
    assert [text.get_text() for text in sheet.legends[0].get_texts()] == list(example.TITLES.values())


# ---------------------------------------------------------------------------------------------------------------
# Interrupted runs, and those of other settings
# ---------------------------------------------------------------------------------------------------------------

ARGUMENTS = ["--scales", "4", "--methods", "dysample", "dlu", "--seeds", "7", "--steps", "8", "--device", "cpu"]


def runs_of(out):
    return json.loads((out / "train.json").read_text())["runs"]


def test_interrupted_runs_give_the_same_bits(short, monkeypatch, tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert example.main([*ARGUMENTS, "--out", str(whole)]) == 0
    rate, steps = example.rate, []

    def stop_at(*stops):
        def stopping(step, of):
            if len(steps) in stops:
                steps.append(None)
                raise KeyboardInterrupt
            steps.append(step)
            return rate(step, of)

        monkeypatch.setattr(example, "rate", stopping)

    stop_at(5, 15)
    capsys.readouterr()
    assert example.main([*ARGUMENTS, "--out", str(parts)]) == 130
    assert capsys.readouterr().err.strip().endswith("train_upsampler: stopped; the same command goes on from here")
    assert [path.name for path in (parts / "runs").iterdir()] == ["dysample-4x-seed7.pt"]
    assert example.main([*ARGUMENTS, "--out", str(parts)]) == 130
    assert sorted(path.name for path in (parts / "runs").iterdir()) == ["dlu-4x-seed7.pt", "dysample-4x-seed7.json"]
    assert example.main([*ARGUMENTS, "--out", str(parts)]) == 0
    assert steps == [0, 1, 2, 3, 4, None, 3, 4, 5, 6, 7, 0, 1, 2, 3, None, 3, 4, 5, 6, 7]
    assert sorted(path.name for path in (parts / "runs").iterdir()) == ["dlu-4x-seed7.json", "dysample-4x-seed7.json"]
    for one, other in zip(runs_of(whole), runs_of(parts), strict=True):
        assert one["weights"] == other["weights"]
        assert {k: v for k, v in one.items() if k not in TIMES} == {k: v for k, v in other.items() if k not in TIMES}
    one, other = runs_of(whole)
    assert one["weights"] != other["weights"]
    stop_at(len(steps))
    before = runs_of(parts)
    assert example.main([*ARGUMENTS, "--out", str(parts)]) == 0, "a finished run was repeated"
    assert runs_of(parts) == before


def test_other_settings_are_refused(short, error, monkeypatch, tmp_path):
    arguments = ["--scales", 8, "--methods", "nearest", "--seeds", 0, "--out", tmp_path]
    assert example.main([*map(str, arguments), "--steps", "2", "--device", "cpu"]) == 0
    before = (tmp_path / "runs" / "nearest-8x-seed0.json").read_bytes()
    message = error(*arguments, "--steps", 3)
    assert "nearest-8x-seed0.json was made with another steps, 2 and not 3: choose another --out" in message
    monkeypatch.setattr(example, "LEARNING_RATE", 1e-3)
    assert "another learning_rate, 0.004 and not 0.001" in error(*arguments, "--steps", 2)
    monkeypatch.undo()
    monkeypatch.setattr(example, "HELD_OUT", ("chelsea.png",))
    monkeypatch.setattr(example, "commit", lambda: "another")
    assert "another commit" in error(*arguments, "--steps", 2)
    assert (tmp_path / "runs" / "nearest-8x-seed0.json").read_bytes() == before


def test_checkpoints_of_other_settings_are_refused(short, error, monkeypatch, tmp_path):
    arguments = ["--scales", 8, "--methods", "nearest", "--seeds", 0, "--out", tmp_path]
    rate = example.rate

    def stopping(step, steps):
        if step == 3:
            raise KeyboardInterrupt
        return rate(step, steps)

    monkeypatch.setattr(example, "rate", stopping)
    assert example.main([*map(str, arguments), "--steps", "5", "--device", "cpu"]) == 130
    monkeypatch.setattr(example, "rate", rate)
    assert "nearest-8x-seed0.pt was made with another steps, 5 and not 4" in error(*arguments, "--steps", 4)
    path = tmp_path / "runs" / "nearest-8x-seed0.pt"
    path.write_bytes(path.read_bytes()[:1000])
    assert f"cannot read {path}: it is damaged; delete it" in error(*arguments, "--steps", 5)


@pytest.mark.parametrize("text", ("", "{", "[]", "{}", '{"key": {}}'))
def test_damaged_results_are_refused(short, error, tmp_path, text):
    path = tmp_path / "runs" / "nearest-8x-seed0.json"
    path.parent.mkdir()
    path.write_text(text)
    arguments = ["--scales", 8, "--methods", "nearest", "--seeds", 0, "--steps", 2, "--out", tmp_path]
    assert f"cannot read {path}: it is damaged; delete it" in error(*arguments)


# ---------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------


def test_whole_command(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["OMP_NUM_THREADS"] = "1"
    out = tmp_path / "new" / "out"
    arguments = ["--scales", "8", "--methods", "dlu", "nearest", "--seeds", "1", "0", "--steps", "2", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, FILE, *arguments, "--out", out], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "run 4/4: dlu-8x-seed0" in done.stderr
    found = json.loads((out / "train.json").read_text())
    assert [(run["method"], run["seed"]) for run in found["runs"]] == [
        ("nearest", 0),
        ("nearest", 1),
        ("dlu", 0),
        ("dlu", 1),
    ]
    assert len({run["weights"] for run in found["runs"]}) == 4
    for row in found["methods"]:
        mine = [run for run in found["runs"] if run["method"] == row["method"]]
        means = [sum(run["psnr"].values()) / len(run["psnr"]) for run in mine]
        assert list(mine[0]["psnr"]) == list(mine[0]["ssim"]) == list(example.HELD_OUT)
        assert row["psnr"] == pytest.approx(sum(means) / 2)
        assert row["psnr_deviation"] == pytest.approx(abs(means[0] - means[1]) / 2**0.5)
        assert row["parameters"] == example.cost(row["method"], 8)[0]
        assert all(row[name] > 0 for name in TIMES)
    assert found["seeds"] == [1, 0]
    assert found["settings"]["steps"] == 2
    assert found["machine"]["torch"] == torch.__version__
    assert found["machine"]["commit"] is None or re.fullmatch("[0-9a-f]{40}(-dirty)?", found["machine"]["commit"])
    assert example.table(found) in done.stdout
    assert example.verdicts(found)[0] in done.stdout
    assert (out / "train.md").read_text() == example.document(found)
    with Image.open(out / "train.png") as plot:
        plot.load()
        assert min(plot.size) > 400


def test_out_cannot_be_written(error, tmp_path):
    (tmp_path / "file").touch()
    assert "cannot write" in error("--out", tmp_path / "file")
    assert "cannot write" in error("--out", tmp_path / "file" / "out")
    (tmp_path / "runs").touch()
    assert "cannot write" in error("--out", tmp_path)


@pytest.mark.parametrize("name", ("nonsense", "meta", "cuda:99"))
def test_devices_that_are_not_there(capsys, tmp_path, name):
    assert example.main(["--device", name, "--out", str(tmp_path / "out")]) == 1
    message = capsys.readouterr().err
    assert message.startswith(f"train_upsampler: error: cannot use --device {name}: ")
    assert message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_photographs_that_are_not_there(short, error, monkeypatch, tmp_path):
    monkeypatch.setattr(example, "HELD_OUT", ("moon_landing.png",))
    assert "has moon_landing.png" in error("--out", tmp_path)


def test_a_loss_that_is_not_finite(short, error, monkeypatch, tmp_path):
    monkeypatch.setattr(example, "LEARNING_RATE", 1e30)
    message = error("--out", tmp_path, "--scales", 8, "--methods", "nearest", "--seeds", 0, "--steps", 9)
    assert re.search(r"the loss of nearest-8x-seed0 is (nan|inf) in step \d", message)


@pytest.mark.parametrize("missing", ("PIL", "matplotlib.figure", "skimage", "sklearn", "tqdm"))
def test_missing_extra(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(
        SystemExit, match=r'^train_upsampler: error: .*; pip install "dlu-triton\[examples\]"$'
    ) as stopped:
        load("_bare_train_upsampler")
    assert "\n" not in stopped.value.code


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "must be an integer of at most 15 digits and at least 1, got '0'"),
        (["--seeds", "x"], "must be an integer of at most 15 digits and at least 0, got 'x'"),
        (["--seeds", "-1"], "must be an integer of at most 15 digits and at least 0, got '-1'"),
        (["--seeds", "9" * 20], f"must be an integer of at most 15 digits and at least 0, got '{'9' * 20}'"),
        (["--seeds"], "expected at least one argument"),
        (["--scales", "3"], "invalid choice: 3 "),
        (["--methods", "bicubic"], "invalid choice: 'bicubic' "),
    ],
)
def test_arguments_that_are_none(arguments, message, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        example.main(arguments)
    assert f"error: argument {arguments[0]}: {message}" in capsys.readouterr().err


def test_output_that_nobody_reads(monkeypatch):
    def left(options, device):
        raise BrokenPipeError

    monkeypatch.setattr(example, "train_all", left)
    with open(os.devnull, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        assert example.main([]) == 1
