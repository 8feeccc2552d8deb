import logging

import numpy as np
import pytest
from PIL import Image

from diffusion_jax import data
from diffusion_jax.data import folder, images
from diffusion_jax.errors import UserError
from diffusion_jax.settings import DataSettings
from diffusion_jax.types import ImageSpec


def save(path, colour=(200, 30, 40), size=(12, 12), mode="RGB", **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path, **more)


def classes(root, names=("cat", "dog"), each=30, **more):
    for label, name in enumerate(names):
        for i in range(each):
            save(root / name / f"{i:03d}.png", colour=(label * 100, i, 7), **more)
    return root


def build(root, **more):
    return data.build(DataSettings(name=f"folder:{root}", **more))


def refusal(root, **more):
    with pytest.raises(UserError) as refused:
        build(root, **more)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def every(source):
    return [source[i] for i in range(len(source))]


def test_sub_directories_are_classes_and_files_come_back_exactly(tmp_path):
    dataset = build(classes(tmp_path))
    assert dataset.spec == ImageSpec(size=12, channels=3, num_classes=2)
    seen = set()
    for part, held_out in ((dataset.train, False), (dataset.held_out, True)):
        for example in every(part):
            red, number, blue = (int(value) for value in example["image"][3, 5])
            assert (red, blue) == (example["label"] * 100, 7)
            assert (example["image"] == example["image"][0, 0]).all()
            assert (folder.fingerprint(f"{('cat', 'dog')[example['label']]}/{number:03d}.png") % 10 == 0) == held_out
            seen.add((red, number))
    assert len(seen) == len(dataset.train) + len(dataset.held_out) == 60


def test_without_sub_directories_there_are_no_labels(tmp_path):
    for i in range(40):
        save(tmp_path / f"{i}.png", colour=(i, 0, 0))
    dataset = build(tmp_path)
    assert dataset.spec.num_classes == 0
    assert dataset.train[0].keys() == {"image"}


def test_the_held_out_share_is_a_tenth_and_stays_when_images_are_added(tmp_path):
    held = [folder.fingerprint(f"cat/{i}.png") % 10 == 0 for i in range(20_000)]
    assert abs(np.mean(held) - 0.1) < 0.01  # 5 standard deviations
    before = {file.name for file in build(classes(tmp_path)).held_out.files}
    save(tmp_path / "ant" / "new.png")
    after = {file.name for file in build(tmp_path).held_out.files}
    assert after - {"ant/new.png"} == before


def test_train_and_test_directories_are_the_split(tmp_path):
    classes(tmp_path / "train", each=5)
    classes(tmp_path / "test", each=2)
    dataset = build(tmp_path)
    assert (len(dataset.train), len(dataset.held_out)) == (10, 4)
    assert dataset.spec.num_classes == 2
    assert [example["label"] for example in every(dataset.held_out)] == [0, 0, 1, 1]
    classes(tmp_path / "valid", each=3)
    assert len(build(tmp_path, held_out_split="valid").held_out) == 6
    assert "data.held_out_split = 'nowhere'" in refusal(tmp_path, held_out_split="nowhere")


def test_half_a_split_and_split_strings_are_refused(tmp_path):
    classes(tmp_path / "train")
    assert "data.held_out_split = 'test'" in refusal(tmp_path)
    classes(tmp_path / "flat")
    assert "data.train_split = 'train[:90%]'" in refusal(tmp_path / "flat", train_split="train[:90%]")
    assert "data.held_out_split = 'valid'" in refusal(tmp_path / "flat", held_out_split="valid")


def test_broken_and_foreign_files_are_named_counted_and_skipped(tmp_path, caplog):
    classes(tmp_path, size=(64, 64))
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    for name, kind in (("cut.png", "PNG"), ("cut.jpg", "JPEG"), ("cut.webp", "WEBP")):
        Image.fromarray(noise).save(tmp_path / "cat" / name, kind)
        whole = (tmp_path / "cat" / name).read_bytes()
        (tmp_path / "cat" / name).write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cat" / "empty.png").write_bytes(b"")
    (tmp_path / "dog" / "text.png").write_text("not an image")
    (tmp_path / "dog" / "notes.txt").write_text("a note")
    (tmp_path / "LICENSE").write_text("a licence")
    Image.fromarray(noise).save(tmp_path / "dog" / "gif.png", "GIF")
    for hidden in (".DS_Store", "cat/._000.png", ".cache/x.png"):
        (tmp_path / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / hidden).write_bytes(b"hidden")
    with caplog.at_level(logging.WARNING):
        dataset = build(tmp_path)
    assert len(dataset.train) + len(dataset.held_out) == 60
    lines = [record.getMessage() for record in caplog.records]
    bad = ["cut.png", "cut.jpg", "cut.webp", "empty.png", "text.png", "notes.txt", "LICENSE", "gif.png"]
    assert len(lines) == len(bad) + 1
    for name in bad:
        assert sum(f"/{name}:" in line for line in lines) == 1
    assert all("\n" not in line for line in lines)
    assert lines[-1] == "8 of 68 files skipped, 60 images left"


def test_a_whole_directory_is_silent(tmp_path, caplog):
    build(classes(tmp_path))
    assert not caplog.records


def test_directories_without_images_are_refused(tmp_path):
    assert "no such directory" in refusal(tmp_path / "missing")
    assert "no such directory" in refusal("")
    (tmp_path / "empty").mkdir()
    assert "holds no image" in refusal(tmp_path / "empty")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("a")
    assert "holds no image" in refusal(tmp_path / "text")
    save(tmp_path / "one" / "a.png")
    assert "1 images" in refusal(tmp_path / "one")
    save(classes(tmp_path / "mixed") / "stray.png")
    assert "stray.png" in refusal(tmp_path / "mixed")


def test_formats_suffixes_and_modes(tmp_path):
    for i in range(30):
        save(tmp_path / f"{i}.png", colour=(90, 90, 90), mode="L")
    assert build(tmp_path).spec.channels == 1
    assert build(tmp_path).train[0]["image"].shape == (12, 12, 1)
    save(tmp_path / "a.JPG", quality=95)
    save(tmp_path / "b.jpeg", quality=95)
    save(tmp_path / "c.webp", lossless=True)
    save(tmp_path / "d.png", mode="P")
    dataset = build(tmp_path)
    assert dataset.spec.channels == 3
    grey = [example["image"] for example in every(dataset.train) if example["image"][0, 0, 0] == 90]
    assert grey
    assert all((image == 90).all() for image in grey)
    assert len(dataset.train) + len(dataset.held_out) == 34


def test_transparency_is_laid_on_white_and_16_bits_are_scaled(tmp_path):
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    clear.paste((10, 20, 30, 255), (0, 0, 2, 4))
    clear.save(tmp_path / "clear.png")
    decoded = np.asarray(folder.decode(tmp_path / "clear.png"))
    assert (decoded[:, :2] == (10, 20, 30)).all()
    assert (decoded[:, 2:] == 255).all()
    deep = (np.arange(16, dtype=np.uint16) * 4369).reshape(4, 4)  # 0, 0x1111, ... 0xffff
    Image.fromarray(deep).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(np.asarray(folder.decode(tmp_path / "deep.png")).ravel(), np.arange(16) * 17)
    bits = Image.new("1", (4, 4), 1)
    assert (np.asarray(images.plain(bits)) == 255).all()
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "palette.png", transparency=1)
    np.testing.assert_array_equal(np.asarray(folder.decode(tmp_path / "palette.png")), [[[255, 0, 0], [255] * 3]])


def test_photographs_stand_upright(tmp_path):
    image = Image.new("L", (6, 4))
    image.putpixel((0, 0), 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to look at it
    image.save(tmp_path / "turned.png", exif=exif)
    upright = np.asarray(folder.decode(tmp_path / "turned.png"))
    assert upright.shape == (6, 4)
    assert upright[0, 3] == 255


def test_sizes_must_agree_unless_one_is_given(tmp_path):
    classes(tmp_path / "wide", size=(20, 10))
    assert "data.image_size = 0" in refusal(tmp_path / "wide")
    assert "20x10" in refusal(tmp_path / "wide")
    assert build(tmp_path / "wide", image_size=5).train[0]["image"].shape == (5, 5, 3)
    save(classes(tmp_path / "two") / "cat" / "big.png", size=(24, 24))
    assert "12x12 and 24x24" in refusal(tmp_path / "two")


def test_square_keeps_the_aspect_and_the_centre():
    """A disc stays a disc: its area, width, height and centre after the resize follow from geometry."""
    for width, height, size in ((400, 300, 64), (300, 400, 64), (130, 100, 64), (40, 30, 64), (1000, 256, 32)):
        short = min(width, height)
        y, x = np.mgrid[:height, :width]
        distance = np.hypot(x - (width - 1) / 2, y - (height - 1) / 2)
        disc = Image.fromarray(np.where(distance < short * 0.4, 255, 0).astype(np.uint8))
        small = np.asarray(images.square(disc, size), np.float64) / 255.0
        assert small.shape == (size, size)
        centre = (size - 1) / 2
        mass = small.sum()
        assert abs((small.sum(axis=0) * np.arange(size)).sum() / mass - centre) < 0.6
        assert abs((small.sum(axis=1) * np.arange(size)).sum() / mass - centre) < 0.6
        assert mass == pytest.approx(np.pi * (0.4 * size) ** 2, rel=0.03)
        spread = np.sqrt([(small.sum(axis=axis) * (np.arange(size) - centre) ** 2).sum() / mass for axis in (0, 1)])
        np.testing.assert_allclose(spread, 0.4 * size / 2, rtol=0.03)  # radius / 2 for a disc


def test_square_antialiases_and_crops():
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (256, 128)))
    assert np.abs(np.asarray(images.square(stripes, 32)).astype(int) - 127).max() <= 1
    ramp = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8), (100, 1)))
    np.testing.assert_array_equal(np.asarray(images.square(ramp, 100))[0], np.arange(50, 150))
    assert images.square(ramp, 0) is ramp
    same = Image.fromarray(np.zeros((7, 7), np.uint8))
    assert images.square(same, 7) is same
