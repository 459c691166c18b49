"""DLU and CARAFE as layers of Ultralytics YOLO models, by their YAML.

    pip install -c constraints.txt ".[examples]" ultralytics && python examples/ultralytics_dlu.py

`register` and `write_yaml` are to be imported or pasted; they need dlu_triton and ultralytics alone. Run as a program,
this file writes a small data set of handwritten digits on photographs, trains `ultralytics_dlu.yaml` on it from random
weights, or another YAML whose upsampling it replaces, reads the checkpoint again, measures it on photographs and digits
that it has not seen, and predicts one of them. It needs no network: Ultralytics is told that there is none, and finds
its settings and a font in the folder `--out`. One short run shows that the parts work together, no more.

Ultralytics is under AGPL-3.0, and so is what is derived from it; none of its code is here.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

try:
    import yaml

    import dlu_triton
except ImportError as error:
    advice = f"{error}; pip install dlu-triton ultralytics"
    if __name__ == "__main__":
        sys.exit(f"ultralytics_dlu: error: {advice}")
    raise ImportError(advice) from error

if TYPE_CHECKING:
    import torch

__all__ = ["register", "write_yaml"]

LAYERS = {"DLU": dlu_triton.DLUPack, "CARAFE": dlu_triton.CARAFEPack}


# ---------------------------------------------------------------------------------------------------------------
# To import or paste
# ---------------------------------------------------------------------------------------------------------------


def register() -> None:
    """Make `DLU` and `CARAFE` known to model YAMLs, for this process. Once, before a YAML or a resumed run is read.

    A row is `[-1, 1, DLU, [c2, 2]]`: Ultralytics looks arguments up among the variables of its parser, where `c2` is
    the number of channels of the row before, after width scaling; 2 is the scale factor. Further arguments are those
    of `dlu_triton.DLUPack`. A checkpoint holds the modules themselves, so to load one `dlu_triton` need only be
    installed.
    """
    from ultralytics.nn import tasks

    for name, layer in LAYERS.items():
        if getattr(tasks, name, layer) is not layer:
            raise RuntimeError(f"Ultralytics has a layer {name} of its own")
        setattr(tasks, name, layer)


def write_yaml(source: str | Path, path: str | Path, layer: str = "DLU") -> int:
    """Write a model YAML with `layer` in place of its 2x upsampling; returns how many rows were replaced.

    Args:
        source: a model YAML, a file or the name of one that comes with Ultralytics, such as "yolo11n.yaml".
        path: the new file. Ultralytics reads the model's size in its name: call it "yolo11n-dlu.yaml".
        layer: "DLU" or "CARAFE".
    """
    from ultralytics.nn.tasks import yaml_model_load

    if layer not in LAYERS:
        raise ValueError(f"layer must be one of {', '.join(LAYERS)}, got {layer!r}")
    config = yaml_model_load(str(source))
    config = {name: value for name, value in config.items() if name not in ("scale", "yaml_file")}
    replaced = 0
    for row in (row for part in ("backbone", "head") for row in config[part]):
        if row[2] == "nn.Upsample":
            if row[0] != -1 or row[1] != 1 or row[3][1] != 2:
                raise ValueError(f"source: rows of nn.Upsample must be [-1, 1, nn.Upsample, [None, 2, ...]], got {row}")
            row[2:] = [layer, ["c2", 2]]
            replaced += 1
    Path(path).write_text(yaml.safe_dump(config, sort_keys=False, default_flow_style=None, width=120))
    return replaced


# ---------------------------------------------------------------------------------------------------------------
# The program
# ---------------------------------------------------------------------------------------------------------------

MODEL = Path(__file__).with_suffix(".yaml")
SIZES = ((97, 119), (113, 101), (127, 135))  # height and width of the scenes, in pixels
SIDE = 128  # pixels, of the squares into which Ultralytics puts them
IMAGES, HELD_OUT_IMAGES = 300, 100
SEED, HELD_OUT_SEED = 1, 12345
EPOCHS = 15
BATCH = 16
LEARNING_RATE = 2e-3


def write_data(folder: Path, images: int, held_out_images: int) -> Path:
    """A data set in the layout of Ultralytics; its YAML."""
    import torch
    from PIL import Image
    from scenes import Scenes

    for part, held_out, count, seed in (
        ("train", False, images, SEED),
        ("val", True, held_out_images, HELD_OUT_SEED),
    ):
        scenes, generator = Scenes(held_out=held_out), torch.Generator().manual_seed(seed)
        pictures, labels = folder / "images" / part, folder / "labels" / part
        for directory in (pictures, labels):
            directory.mkdir(parents=True)
        for number in range(count):
            height, width = SIZES[number % len(SIZES)]
            scene = scenes.draw(height, width, generator)
            pixels = (255 * scene.pixels.clamp(0, 1)).round().byte().permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(pictures / f"{number:04}.png")
            middles = (scene.boxes[:, :2] + scene.boxes[:, 2:]) / 2
            boxes = torch.cat((middles, scene.boxes[:, 2:] - scene.boxes[:, :2]), 1)
            boxes /= torch.tensor([width, height, width, height])
            lines = [
                f"{label} {' '.join(map(str, box))}"
                for label, box in zip(scene.labels.tolist(), boxes.tolist(), strict=True)
            ]
            (labels / f"{number:04}.txt").write_text("\n".join(lines) + "\n")
    path = folder / "data.yaml"
    names = {digit: str(digit) for digit in range(10)}
    path.write_text(yaml.safe_dump({"path": str(folder), "train": "images/train", "val": "images/val", "names": names}))
    return path


def offline(folder: Path) -> None:
    """Before Ultralytics is imported: it fetches and installs nothing, and leaves the user's settings as they are."""
    os.environ["YOLO_OFFLINE"] = "true"
    os.environ["YOLO_AUTOINSTALL"] = "false"
    os.environ["YOLO_CONFIG_DIR"] = str(folder)
    from matplotlib import get_data_path

    # In this subfolder it looks for a font with which it would draw, and would download it otherwise.
    settings = folder / "Ultralytics"
    settings.mkdir(parents=True, exist_ok=True)
    font = Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    (settings / "Arial.ttf").write_bytes(font.read_bytes())


def run(options: argparse.Namespace, device: torch.device) -> None:
    from train_upsampler import UserError, prepare

    if importlib.util.find_spec("ultralytics") is None:  # not imported before it is told to be offline
        raise UserError("there is no ultralytics; pip install ultralytics")
    out = options.out.resolve()
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{options.out} is not empty: choose another --out, or delete it")
    prepare(out)
    offline(out)
    from ultralytics import YOLO

    register()
    data = write_data(out / "data", options.images, options.held_out_images)
    model = MODEL
    if options.model is not None:
        model = out / f"{Path(options.model).stem}-{options.layer.lower()}.yaml"
        rows = write_yaml(options.model, model, options.layer)
        print(f"{model}: {options.layer} in {rows} rows")
    common = {"data": str(data), "imgsz": SIDE, "batch": BATCH, "device": str(device), "workers": 0, "plots": False}
    start = time.perf_counter()
    YOLO(str(model), task="detect").train(
        **common,
        epochs=options.epochs,
        optimizer="AdamW",
        lr0=LEARNING_RATE,
        nbs=BATCH,  # a step for every batch; by default one for every 64 images
        warmup_epochs=1,
        fliplr=0.0,  # digits have no mirror images
        amp=False,  # which Ultralytics checks, on a GPU, with weights that it downloads
        pretrained=False,
        project=str(out),
        name="training",
    )
    seconds = time.perf_counter() - start

    path = out / "training" / "weights" / "best.pt"
    trained = YOLO(str(path))
    figures = trained.val(**common, project=str(out), name="validation", verbose=False).box
    layers = [module for module in trained.model.modules() if isinstance(module, tuple(LAYERS.values()))]
    parameters = sum(each.numel() for layer in layers for each in layer.parameters())
    picture = sorted((out / "data" / "images" / "val").iterdir())[0]
    (found,) = trained.predict(str(picture), imgsz=SIDE, device=str(device), verbose=False)
    lines = (out / "data" / "labels" / "val" / f"{picture.stem}.txt").read_text().splitlines()
    print(f"\n{picture.name} of the held-out scenes has the digits {', '.join(line[0] for line in lines)}. Found, with")
    print(f"scores, and boxes x0, y0, x1, y1 in pixels:{'' if len(found.boxes) else ' nothing.'}")
    for label, score, box in zip(found.boxes.cls, found.boxes.conf, found.boxes.xyxy, strict=True):
        print(f"  {int(label)}: {score:.2f}, {' '.join(f'{side:.0f}' for side in box)}")
    print(
        f"{options.epochs} epochs of {options.images} scenes in {seconds:.0f} s. Of {options.held_out_images} held-out "
        f"scenes: mAP50 {figures.map50:.3f}, mAP50-95 {figures.map:.3f}.\n{len(layers)} layers of ours with "
        f"{parameters:,} of {sum(each.numel() for each in trained.model.parameters()):,} parameters. The checkpoint: "
        f"{path}\nOne short run of one seed ranks nothing."
    )


def main(arguments: list[str] | None = None) -> int:
    from train_upsampler import integer, run_program

    parser = argparse.ArgumentParser(prog="ultralytics_dlu", description=__doc__.splitlines()[0])
    parser.add_argument("--model", help=f"a YAML whose upsampling is replaced, such as yolo11n.yaml; else {MODEL.name}")
    parser.add_argument("--layer", choices=LAYERS, default="DLU", help="in the place of its nn.Upsample")
    parser.add_argument("--epochs", type=partial(integer, low=1), default=EPOCHS, help=f"{EPOCHS} by default")
    for name, count in (("--images", IMAGES), ("--held-out-images", HELD_OUT_IMAGES)):
        parser.add_argument(name, type=partial(integer, low=1), default=count, help=f"{count} by default")
    parser.add_argument("--out", type=Path, default=Path("dlu_yolo"), help="a new folder, dlu_yolo by default")
    return run_program(run, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
