"""Any folder and any data set becomes regular rows; the LoRA file is one that stock diffusers takes whole."""

import argparse
import io
import json
import re
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from PIL import Image
from safetensors.torch import load_file

import train_img2img_ddpo as trainer
from components import picture, tiny_components


def numbered(number: int) -> bytes:
    """A picture that is known again by its red."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (10 * number, 0, 100)).save(buffer, format="PNG")
    return buffer.getvalue()


def numbers(count: int, form: str = "{}.png") -> dict[str, bytes]:
    return {form.format(number): numbered(number) for number in range(count)}


def write(folder: Path, files: dict[str, bytes | None], rows: list[dict] = ()) -> Path:
    """Writes files, None removes one; rows are those of metadata.jsonl."""
    if rows:
        files = files | {"metadata.jsonl": "\n".join(map(json.dumps, rows)).encode()}
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    return folder


def load(flag: str, source: Path, *arguments) -> tuple[trainer.ImagePrompts, trainer.ImagePrompts]:
    fixed = ["--resolution=16", "--output_dir=does-not-exist", f"--cache_dir={source.parent / 'cache'}"]
    return trainer.load_data(trainer.parse_args([*fixed, flag, *map(str, (source, *arguments))]))


def read(data: trainer.ImagePrompts, column: str = "init_image") -> list[tuple[int, str]]:
    """Number of the picture in a column, and prompt, of every row."""
    rows = [data.load(index) for index in range(len(data))]
    return [(round(metadata[column][0, 0, 0].item() * 25.5), prompt) for _, prompt, metadata in rows]


LAYERS = "to_k,to_q,to_v,to_out.0", "proj_in,proj_out,ff.net.2,conv_in", "to_k,to_q,to_v,to_out.0,conv1,conv2"
ODD = "train.png", "photo of a train.jpg", "house test.png", "pics [2024]/a.png", "c::d.png", "validation-1.jpeg"
LONG = "long " * 1600
LISTED = [{"file_name": f"{number}.png", "text": str(number)} for number in range(20)]
KINDS = [{**row, "text": text} for row, text in zip(LISTED, [[], None, ["first", "second"], "", LONG, "last"])]
TXT = {"0.txt": b"zero\n", "1.txt": "один".encode(), "3.txt": b""}
CSV = b"file_name,story,text\n0.png,one,a\n1.png,two,b\n2.png,six,c\n"
NO_CAPTION = "{} of {} rows have no caption"
# files, rows of metadata, a flag, the prompts by number of the picture, and all that is said
FOLDERS = {
    "odd names": (dict(zip(ODD, numbers(6).values())), [], "", [""] * 6, ""),
    "six pictures, five captions each": (numbers(6), LISTED[:6] * 5, "", list("012345"), ""),
    "captions of all kinds": (numbers(6), KINDS, "", ["", "", "first", "", LONG, "last"], NO_CAPTION.format(3, 6)),
    "captions in .txt": (numbers(4) | TXT, [], "", ["zero", "один", "", ""], NO_CAPTION.format(2, 4)),
    "captions in .csv": (numbers(3) | {"metadata.csv": CSV}, [], "--caption_column=story", ["one", "two", "six"], ""),
    "12 of 20 listed": (numbers(20), LISTED[:12], "", list(map(str, range(12))), "8 pictures, as .*/12.png, are in no metadata: "),
    "--prompt beside captions": (numbers(3), LISTED[:3], "--prompt=all", ["all"] * 3, "captions .* are not used"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_folders(name, tmp_path, capsys):
    """Every picture is used, with its prompt, and none is both trained on and held out."""
    files, rows, flag, prompts, said = FOLDERS[name]
    train, held_out = load("--train_data_dir", write(tmp_path / "data", files, rows), *flag.split())
    trained, tested = read(train), read(held_out)
    assert {*trained, *tested} == set(enumerate(prompts)) and not set(trained) & set(tested)
    assert len(tested) == len(set(tested)) == len(prompts) // 3
    assert len(trained) == len(set(trained)) * (5 if "five" in name else 1)
    assert re.fullmatch(f".*{said}.*\n" if said else "", capsys.readouterr().out)


def test_splits_and_classes_are_folders(tmp_path):
    """Held-out pictures come from `validation`, else from `test`; rows are shuffled before some are selected."""
    names = ["train/validation.png", "b.png", "test/2.png", "validation/3.png"]
    for count in (3, 4):
        source = write(tmp_path / "data", dict(zip(names[:count], numbers(count).values())))
        train, held_out = load("--train_data_dir", source)
        assert sorted(read(train)) == [(0, ""), (1, "")] and read(held_out) == [(count - 1, "")]
    files = {f"{kind}/{name}": content for kind in ("cat", "dog", "fox") for name, content in numbers(8).items()}
    flags = ["--train_data_dir", write(tmp_path / "classes", files), "--max_train_samples=8"]
    for data, again, other in zip(load(*flags), load(*flags), load(*flags, "--seed=1")):
        labels = [data.load(index)[2]["label"] for index in range(8)]
        assert len(set(labels)) > 1 and set(labels) <= {"cat", "dog", "fox"}
        assert len(data) == 8 and data.order == again.order != other.order


def test_pictures_are_upright_scaled_cut_and_flipped_with_their_targets(tmp_path):
    upright = picture(64)
    upright.paste((250, 250, 10), (0, 0, 32, 8))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "0.png", exif=exif)
    levels = np.arange(96 * 64, dtype=np.uint16).reshape(64, 96) * 10  # 16 bits
    Image.fromarray(levels).save(tmp_path / "wide.png")
    write(tmp_path, {}, [{"file_name": "0.png", "target_file_name": "wide.png"}])
    train, _ = load("--train_data_dir", tmp_path, "--resolution=64")
    for flip, centering, left in ((False, (0.5, 0.5), 16), (True, (0.25, 1), 8)):
        image, _, metadata = train.load(0, flip, centering)
        gray = np.rint(levels[:, left : left + 64] / 257)
        for tensor, pixels in ((image, np.asarray(upright)), (metadata["target"], np.stack([gray] * 3, axis=2))):
            expected = pixels[:, ::-1] if flip else pixels
            np.testing.assert_allclose(tensor * 255, expected.transpose(2, 0, 1), atol=1e-4)


@pytest.mark.parametrize("content", [numbered(9)[:50], b"", b"<html>", None], ids=["cut", "empty", "HTML", "absent"])
@pytest.mark.parametrize("column", ["image", "target"])
def test_the_next_row_takes_the_place_of_a_damaged_picture(content, column, tmp_path, capsys):
    """Always the same one, after one warning with file and row; nothing readable is an error."""
    rows = [{"file_name": f"image/{name}", "target_file_name": f"target/{name}"} for name in numbers(20)]
    write(tmp_path, numbers(20, "image/{}.png") | numbers(20, "target/{}.png"), rows)
    train, _ = load("--train_data_dir", tmp_path)
    expected = read(train)
    expected[7] = expected[8]
    paths = [f"{column}/{number}.png" for number in train.order]
    write(tmp_path, {paths[7]: content})
    assert read(train) == read(load("--train_data_dir", tmp_path)[0]) == expected
    told = rf"Warning: row {train.order[7]}, {column} {tmp_path}/{paths[7]}: .*; the next row takes its place\.\n"
    assert re.fullmatch(told, capsys.readouterr().out)
    write(tmp_path, {path: content for path in paths if (tmp_path / path).exists()})
    with pytest.raises(ValueError, match="not one of the pictures can be read"):
        train.load(0)


@pytest.mark.parametrize("kind", ["paths", "bytes", "dicts"])
def test_columns_of_pictures(kind, tmp_path):
    """Whatever they hold and however they were saved, in a format or not: pictures and targets are decoded."""
    files = sorted(write(tmp_path / "png", numbers(10)).iterdir())
    cells = {
        "paths": [str(file) for file in files],
        "bytes": [file.read_bytes() for file in files],
        "dicts": [{"path": str(file), "bytes": None} for file in files],
    }[kind]
    columns = {"image": cells, "target": cells[::-1], "text": ["a"] * 10}
    plain = datasets.Dataset.from_dict(columns)
    plain.save_to_disk(tmp_path / "plain")
    decoded = plain.cast_column("image", datasets.Image()).cast_column("target", datasets.Image())
    decoded.with_format("torch", columns=["image"]).save_to_disk(tmp_path / "torch")
    (tmp_path / "pandas").mkdir()
    pd.DataFrame(columns).to_parquet(tmp_path / "pandas/train.parquet")
    for form in ("plain", "torch", "pandas", "pandas/train.parquet"):
        train, held_out = load("--dataset_name", tmp_path / form)
        order = [number for number, _ in read(train)]
        assert sorted(read(train) + read(held_out)) == [(number, "a") for number in range(10)], form
        assert len(held_out) == 3 and read(train, "target") == [(9 - number, "a") for number in order], form


def test_rows_of_data_sets(tmp_path, capsys):
    """Splits, class names, lists of captions, a row without a picture; equal pictures are known by their bytes."""
    pictures = [numbered(number // 2) for number in range(17)] + [None]
    columns = {"image": pictures, "text": [["a", "b"], [], None] * 6, "kind": [0, 1] * 9}
    dataset = datasets.Dataset.from_dict(columns).cast_column("kind", datasets.ClassLabel(names=["cat", "dog"]))
    dataset.save_to_disk(tmp_path / "one")
    train, held_out = load("--dataset_name", tmp_path / "one")
    assert len(held_out) == 3 and not set(dict(read(train))) & set(dict(read(held_out)))
    assert {train.load(index)[2]["kind"] for index in range(len(train))} == {"cat", "dog"}
    assert {prompt for _, prompt in read(train)} == {"a", ""}
    said = capsys.readouterr().out
    assert NO_CAPTION.format(12, 18) in said and "Warning: row 17, image None: there is no picture; the next" in said
    datasets.DatasetDict(train=dataset, test=dataset.select([0, 4])).save_to_disk(tmp_path / "two")
    train, held_out = load("--dataset_name", tmp_path / "two")
    assert set(dict(read(held_out))) == {0, 2} and len(train) == 14


def test_webdataset(tmp_path):
    source = write(tmp_path / "files", numbers(6, "{}.jpg") | {f"{number}.txt": b"%d" % number for number in range(6)})
    with tarfile.open(write(tmp_path / "tars", {"README.md": b""}) / "0.tar", "w") as tar:
        for path in sorted(source.iterdir()):
            tar.add(path, path.name)
    train, held_out = load("--dataset_name", tmp_path / "tars", "--image_column=jpg", "--caption_column=txt")
    assert (len(train), len(held_out)) == (4, 2)
    assert sorted(read(train) + read(held_out)) == [(number, str(number)) for number in range(6)]


def test_a_target_behind_a_hundred_rows_without(tmp_path):
    rows = [{"file_name": "0.png", "target_file_name": ""}] * 110 + [
        {"file_name": "1.png", "target_file_name": "1.png"}
    ]
    train, held_out = load("--train_data_dir", write(tmp_path, numbers(2), rows), "--num_validation_images=0")
    targets = [train.load(index)[2]["target"] for index in range(111)]
    assert len(held_out) == 0 and [torch.is_tensor(target) for target in targets].count(True) == 1


def test_mistakes_in_data(tmp_path):
    write(tmp_path, numbers(1) | {"empty/a.txt": b"a"}, [{"file_name": "0.png", "init_image_file_name": "0.png"}])
    none = "no images in --train_data_dir=.*: there is no picture"
    told = {"gone": none, "0.png": none, "empty": none, "": "a column is named init_image"}
    for source in told:
        with pytest.raises(SystemExit, match=f"^error: .*{told[source]}.*$"):
            load("--train_data_dir", tmp_path / source)
    rows = datasets.Dataset.from_dict({"image": [numbered(0)], "other": [numbered(1)]})
    datasets.DatasetDict(train=rows, test=rows.remove_columns("image")).save_to_disk(tmp_path / "set")
    with pytest.raises(SystemExit, match="--image_column=image has no pictures; columns are .'other'.\\."):
        load("--dataset_name", tmp_path / "set")


def make(pipe) -> np.ndarray:
    noise = torch.Generator().manual_seed(0)
    return pipe("a disc", picture(), strength=0.9, num_inference_steps=4, generator=noise, output_type="np").images


@pytest.mark.parametrize("layers", LAYERS)
def test_the_lora_file(layers, tmp_path):
    """Stock diffusers takes all its tensors, under any name, twice or as a state dict, and makes the same pictures."""
    policy = StableDiffusionImg2ImgPipeline(**tiny_components())
    base = make(policy)
    lora = trainer.add_lora(policy.unet, argparse.Namespace(lora_layers=layers, rank=2))
    for parameter in lora.values():
        torch.nn.init.normal_(parameter, std=0.3)
    trainer.save_checkpoint(policy, {}, 1, tmp_path, 1)
    saved = load_file(tmp_path / "checkpoint-1" / trainer.LORA)
    assert len(saved) == len(lora) and all(".lora_A." in name or ".lora_B." in name for name in saved)
    assert np.abs(make(policy) - base).max() > 0.01
    for names in ([None], ["other"], ["one", "two"], ["state"]):
        stock = StableDiffusionImg2ImgPipeline(**tiny_components())
        for name in names:
            stock.load_lora_weights(saved if name == "state" else tmp_path / "checkpoint-1", adapter_name=name)
        if len(names) == 2:
            stock.set_adapters(names, [0.25, 0.75])
        assert sum("lora_" in name for name, _ in stock.unet.named_parameters()) == len(saved) * len(names)
        np.testing.assert_allclose(make(stock), make(policy), atol=1e-5)
