"""Any folder and any data set becomes regular rows, and these become samples."""

import io
import json
import re
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

import train_img2img_ddpo as trainer
from components import picture, tiny_components


def numbered(number: int) -> bytes:
    """Return a picture that is known again by its red."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (10 * number, 0, 100)).save(buffer, format="PNG")
    return buffer.getvalue()


def numbers(count: int, form: str = "{}.png") -> dict[str, bytes]:
    return {form.format(number): numbered(number) for number in range(count)}


def write(folder: Path, files: dict[str, bytes | None], rows: list[dict] = ()) -> Path:
    """Write files, and metadata.jsonl with these rows. None removes a file."""
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
    """Return the number of the picture in a column, and the prompt, of every row."""
    rows = [data.load(index) for index in range(len(data))]
    return [(round(metadata[column][0, 0, 0].item() * 25.5), prompt) for _, prompt, metadata in rows]


ODD = "train.png", "photo of a train.jpg", "house test.png", "pics [2024]/a.png", "validation-1.jpeg", "x y#?%.png"
LONG = "long " * 1600
LISTED = [{"file_name": f"{number}.png", "text": str(number)} for number in range(20)]
WINDOWS = [{**row, "file_name": f"imgs\\{row['file_name']}"} for row in LISTED[:3]]
KINDS = [{**row, "text": text} for row, text in zip(LISTED, [[], None, ["first", "second"], [""], [LONG], ["last"]])]
TXT = {"0.txt": b"zero\n", "1.txt": "\ufeffодин".encode(), "3.txt": b""}
CSV = b"file_name,story,text\n0.png,one,a\n1.png,two,b\n2.png,six,c\n"
PARQUET = {"metadata.parquet": pd.DataFrame(LISTED[:3]).to_parquet()}
# Files of other kinds: they are counted, and there is an example of each kind
OTHERS = dict.fromkeys(("0.heic", "0.jxl", "0.caption", "0.TXT", "metadata.json", "@eaDir/0.png"), numbered(0))
SAID = "6 files are not used, such as " + "".join(rf"(?=.*/{name}[,.])" for name in OTHERS)
# files, rows of metadata, a flag, the prompts by number of the picture, and all that is said
FOLDERS = {
    "odd names": (dict(zip(ODD, numbers(6).values())), [], "", [""] * 6, ""),
    "six pictures, five captions each": (numbers(6), LISTED[:6] * 5, "--seed=19", list("012345"), ""),
    "lists of captions": (numbers(6), KINDS, "", ["", "", "first", "", LONG, "last"], "3 of 6 rows have no caption"),
    "captions in .txt": (numbers(4) | TXT, [], "", ["zero", "один", "", ""], "2 of 4 rows have no caption"),
    "metadata.csv": (numbers(3) | {"metadata.csv": CSV}, [], "--caption_column=story", ["one", "two", "six"], ""),
    "metadata.parquet": (numbers(3) | PARQUET, [], "", list("012"), ""),
    "separators of Windows": (numbers(3, "imgs/{}.png"), WINDOWS, "", list("012"), ""),
    "12 of 20 listed": (numbers(20), LISTED[:12], "", list(map(str, range(12))), "8 files are not used, .*/1.?.png"),
    "files of other kinds": (numbers(6) | OTHERS, [], "", [""] * 6, SAID),
    "--prompt beside captions": (numbers(3), LISTED[:3], "--prompt=all", ["all"] * 3, "captions .* are not used"),
}  # fmt: skip


@pytest.mark.parametrize("flag", ["--train_data_dir", "--dataset_name"])
@pytest.mark.parametrize("name", FOLDERS)
def test_folders(name, flag, tmp_path, capsys):
    """Every picture is used, with its prompt, and none is both trained on and held out."""
    files, rows, flags, prompts, said = FOLDERS[name]
    source = write(tmp_path / ".hidden/data", files, rows)
    (source / "loop").symlink_to(".")
    train, held_out = load(flag, source, *flags.split())
    trained, tested = read(train), read(held_out)
    assert {*trained, *tested} == set(enumerate(prompts)) and not set(trained) & set(tested)
    assert len(tested) == len(set(tested)) == len(prompts) // 3
    assert len(trained) == len(set(trained)) * (5 if "five" in name else 1)
    assert ("label" in train.rows.features) == (name == "odd names")  # a folder without metadata
    told = [line for line in capsys.readouterr().out.splitlines() if "too few images" not in line]
    assert len(told) == bool(said) and all(re.fullmatch(f".*{said}.*", line) for line in told)


def test_splits_and_classes_are_folders(tmp_path):
    """Held-out pictures come from `validation`, else from `test`. Rows are shuffled before some are selected."""
    names = ["Train/validation.png", "b.png", "test/2.png"]
    for number, folder in enumerate(["test", "validation", "Validation", "val"]):
        files = dict(zip([*names, f"{folder}/3.png"], numbers(4).values()))
        train, held_out = load("--train_data_dir", write(tmp_path / str(number), files))
        assert sorted(read(train)) == [(0, ""), (1, "")], folder
        assert sorted(read(held_out)) == [(2, ""), (3, "")][folder != "test" :], folder
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
    """It is always the same row, after one warning with file and row. If nothing can be read, that is the error."""
    rows = [{"file_name": f"image/{name}", "target_file_name": f"target/{name}"} for name in numbers(20)]
    write(tmp_path, numbers(20, "image/{}.png") | numbers(20, "target/{}.png"), rows)
    train, _ = load("--train_data_dir", tmp_path)
    expected = read(train)
    expected[7] = expected[8]
    paths = [f"{column}/{Path(train.rows[number][column]['path']).name}" for number in train.order]
    write(tmp_path, {paths[7]: content})
    assert read(train) == read(load("--train_data_dir", tmp_path)[0]) == expected
    told = rf"Warning: row {train.order[7]}, {column} {tmp_path}/{paths[7]}: .*; the next row takes its place\.\n"
    assert re.fullmatch(told, capsys.readouterr().out)
    write(tmp_path, {path: content for path in paths if (tmp_path / path).exists()})
    told = f"error: --train_data_dir={tmp_path}: none of the pictures can be read, .*{column}"
    with pytest.raises(SystemExit, match=told):
        load("--train_data_dir", tmp_path)


def test_columns_of_pictures(tmp_path):
    """Pictures and targets are decoded, whatever the columns hold, in a format or not."""
    files = sorted(write(tmp_path / "png", numbers(10)).iterdir())
    columns = {"image": [str(file) for file in files], "text": ["a"] * 10}
    columns["target"] = [file.read_bytes() for file in files[::-1]]
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
    datasets.DatasetDict(train=plain, test=plain.remove_columns("text")).save_to_disk(tmp_path / "two")
    with pytest.raises(SystemExit, match="held-out images have no column text"):
        load("--dataset_name", tmp_path / "two")


def test_rows_of_data_sets(tmp_path, capsys):
    """Rows have class names, lists of captions, documents or no picture. Equal pictures are known by their bytes."""
    pictures = [None] + [numbered(number // 2) for number in range(17)]  # the first filled cell tells what they are
    columns = {"image": pictures, "text": [["a", "b"], [], None] * 6, "kind": [0, 1] * 9, "pdf": [b""] * 18}
    dataset = datasets.Dataset.from_dict(columns).cast_column("kind", datasets.ClassLabel(names=["cat", "dog"]))
    dataset.cast_column("pdf", datasets.Pdf()).save_to_disk(tmp_path / "one")
    train, held_out = load("--dataset_name", tmp_path / "one")
    assert len(held_out) == 3 and not set(dict(read(train))) & set(dict(read(held_out)))
    assert {train.load(index)[2]["kind"] for index in range(len(train))} == {"cat", "dog"}
    assert {prompt for _, prompt in read(train)} == {"a", ""}
    said = capsys.readouterr().out
    assert "12 of 18 rows have no caption" in said and "column pdf is not used" in said
    assert "Warning: row 0, image None: there is no picture; the next" in said and "pdf" not in train.rows.features


DICT = {"file_name": "0.png", "text": {"en": "a"}}
UTF_16, CELLS = CSV.decode().encode("utf-16"), b"file_name,text\n0.png,a, b\n"
ONLY_VAL = dict.fromkeys(numbers(3)) | {"val/0.png": b""}
# files beside three pictures, rows of metadata, a flag, and what the error says
MISTAKES = {
    "only val": (ONLY_VAL, [], "", "no images to train on, only the split validation"),
    "val is damaged": ({"val/0.png": b"a"}, [], "", "none of the pictures can be read.* .*/val/0.png"),
    "UTF-16 .txt": ({"1.txt": "a".encode("utf-16")}, [], "", "/1.txt is not UTF-8"),
    "cp1252 .txt": ({"1.txt": b"caf\xe9"}, [], "", "/1.txt is not UTF-8"),
    "UTF-16 .csv": ({"metadata.csv": UTF_16}, [], "", "'utf-8' codec.*/metadata.csv"),
    "cp1252 .csv": ({"metadata.csv": CSV + b"0.png,a,caf\xe9"}, [], "", "'utf-8' codec.*/metadata.csv"),
    "more cells": ({"metadata.csv": CELLS}, [], "", "/metadata.csv has more cells than its header, put .* quotes"),
    "init_image": ({}, [{"file_name": "0.png", "init_image_file_name": "1.png"}], "", "rename the column init_image"),
    "dicts": ({}, [DICT], "", "text holds .*'en'.*captions are texts"),
    "no such column": ({}, LISTED[:3], "--caption_column=story", "--caption_column=story .*'text'"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_folders(name, tmp_path):
    """The error is one line that names the flag, the file or the column, and the remedy."""
    files, rows, flags, message = MISTAKES[name]
    write(tmp_path / "data", numbers(3))
    with pytest.raises(SystemExit, match=f"^error: .*({message}).*$"):
        load("--train_data_dir", write(tmp_path / "data", files, rows), *flags.split())


@pytest.mark.parametrize("flag", ["--train_data_dir", "--dataset_name"])
def test_no_pictures(flag, tmp_path, capsys):
    write(tmp_path, {"a.zip": b"PK", "empty/a.md": b""})
    for name in ("absent", "a.zip", "empty"):
        with pytest.raises(SystemExit) as error:
            load(flag, tmp_path / name)
        told = f"error: {flag}={tmp_path}/{name}(: .*. Check the name and the files| is not a folder. Unpack)"
        assert re.search(told, f"{capsys.readouterr().err}{error.value}")


KWARGS = {"strength": 0.9, "num_inference_steps": 3, "output_type": "pt"}  # of the pipeline


@pytest.mark.parametrize("flags", [[], ["--center_crop", "--random_flip"]])
def test_crop_and_flip_of_a_sample(flags, tmp_path):
    Image.linear_gradient("L").rotate(90).resize((64, 16)).save(tmp_path / "0.png")
    train, _ = load("--train_data_dir", tmp_path, *flags, "--num_validation_images=0", "--group_size=2")
    groups = trainer.draw_groups(1, 8, 0, train.args)
    pipe = trainer.StableDiffusionImg2ImgDDPOPipeline(**tiny_components())
    samples = trainer.sample_groups(pipe, train, groups, range(8), ([0], [1.0], [0]), 0, KWARGS, train.args)[2]
    centered = [torch.equal(row["init_image"], train.load(0, flip)[0]) for row, (_, flip) in zip(samples[::2], groups)]
    assert {flip for _, flip in groups} == ({True, False} if flags else {False})
    assert all(centered) if flags else not any(centered)
    assert flags or len({row["init_image"].sum().item() for row in samples}) > 4  # groups have crops of their own


def test_the_baselines(tmp_path, monkeypatch):
    """Best of K is the best draw of each image. Pictures are kept for the grid alone."""
    monkeypatch.setattr(trainer, "GRID_COLUMNS", 3)
    flags = "--num_validation_images=5", "--sample_batch_size=2", "--group_size=3"
    train, held_out = load("--train_data_dir", write(tmp_path, numbers(10)), *flags)
    pipe = trainer.StableDiffusionImg2ImgDDPOPipeline(**tiny_components())
    trainer.add_lora(pipe.unet, train.args)
    functions = {"red": lambda images, prompts, metadata: images[:, 0].mean(dim=(1, 2))}
    weights, place = torch.ones(1).double(), (KWARGS, train.args, Accelerator(cpu=True))
    draws = [trainer.evaluate(pipe, held_out, functions, *place, draw)[1] for draw in range(3)]
    baselines = trainer.evaluate_baselines(pipe, held_out, functions, weights, *place)
    assert torch.equal(baselines["best_of_k_base"][1], torch.stack(draws).amax(dim=0))
    for images, rewards in baselines.values():
        assert len(images) == 3 and len(rewards) == 5
        assert images.untyped_storage().nbytes() <= 4 * images[0].nbytes  # of two batches
        torch.testing.assert_close(rewards[:3, 0].float(), images[:, 0].mean(dim=(1, 2)))
