"""`diffusion-jax traverse`: one row a dimension; and the walks of `edit` for every family. Nothing needs training."""

import json
from dataclasses import asdict, replace

import jax
import numpy as np
import pytest
from PIL import Image

from diffusion_jax.cli import arguments
from diffusion_jax.cli.main import main
from diffusion_jax.cli.model import load_weights
from diffusion_jax.cli.run import assemble, open_run
from diffusion_jax.cli.workdir import keep_config
from diffusion_jax.families import gan, vae
from diffusion_jax.training.checkpoint import Checkpoints

SMALL = {
    "diffusion": ["--config.family.network=dit(patch=4,width=32,depth=1,heads=2)", "--config.sample.steps=3"],
    "vae": ["--config.family.network=flat(channels=8)"],
    "transformer": ["--config.family.network=gpt(width=16,depth=1,heads=2,multiple_of=1)"],
    "transformer-maskgit": ["--config.family.network=maskgit(width=16,depth=1,heads=2)", "--config.sample.steps=4"],
    "tokenizer": [
        "--config.family.network=maskgit(channels=8,multipliers=(1,1),blocks=1)",
        "--config.data.name=digits",
    ],
}
"""config -> what makes it cheap to run on the digits."""

FILES = {"tokenizer": "configs/digits_canvas.py"}
"""config -> the file that has it, where that is not configs/digits.py."""

DIMENSIONS = (63, 0, 27)
VALUES = np.linspace(-40.0, 40.0, 5)  # so much noise in one pixel that its image must show it


pytestmark = pytest.mark.usefixtures("quick_compilation")


def drawn(name, directory, *more):
    """A run of the digits whose weights are drawn at random: at initialisation many outputs are 0.

    `more` are flags of its config.
    """
    directory.mkdir()
    file = FILES.get(name, "configs/digits.py")
    flags = [f"--config={file}:{name}", "--config.sample.batch_size=16", *SMALL.get(name, []), *more]
    it = assemble(arguments.config_of(arguments.parse("train", arguments.define_config, flags)))
    generator = np.random.default_rng(1)

    def draw(leaf):
        return (0.1 * generator.normal(size=leaf.shape)).astype(leaf.dtype)

    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), jax.eval_shape(it.trainer.init))
    state = replace(state, ema=jax.tree.map(draw, state.ema))
    keep_config(directory, it.config)
    checkpoints = Checkpoints(directory, it.settings.checkpoint)
    checkpoints.save(state, 1, {"config": it.config, "spec": asdict(it.spec)})
    checkpoints.close()
    return directory


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return drawn("diffusion", tmp_path_factory.mktemp("runs") / "diffusion")


@pytest.fixture(scope="module", params=["gan", "vae"])
def of_family(request, tmp_path_factory):
    """(name, a run of that family, which has a latent and classes).

    Diffusion's is the other fixture, and what it edits is in test_edit.py.
    """
    return request.param, drawn(request.param, tmp_path_factory.mktemp("runs") / request.param)


def run(command, workdir, tmp_path, *flags):
    assert main([command, f"--workdir={workdir}", f"--out={tmp_path / 'x.npz'}", *flags]) == 0
    with np.load(tmp_path / "x.npz") as file:
        return dict(file)


WIDE = ["--dimensions=63,0,27", "--range=40", "--columns=5", "--label=3"]


def test_one_row_a_dimension(workdir, tmp_path):
    """On rectified flow an image's pixel follows its noise, where that is large, whatever the network says."""
    file = run("traverse", workdir, tmp_path, *WIDE, "--seed=4")
    assert file["images"].shape == (15, 8, 8, 1)
    assert file["images"].dtype == np.uint8
    np.testing.assert_array_equal(file["dimension"], np.repeat(DIMENSIONS, 5))
    np.testing.assert_allclose(file["value"], np.tile(VALUES, 3))
    assert (file["label"] == 3).all()
    about = json.loads(str(file["about"]))
    assert (about["seed"], about["traverse"]["dimensions"]) == (4, list(DIMENSIONS))
    flat = file["images"].reshape(3, 5, 64).astype(float)
    for row, dimension in zip(flat, DIMENSIONS, strict=True):
        spread = np.abs(row[-1] - row[0])
        assert spread[dimension] == 255.0
        assert np.delete(spread, dimension).mean() < 64.0


def test_it_begins_at_what_sample_makes(workdir, tmp_path):
    """At the value that the latent has already, the image is `sample`'s own; the first class where none is asked for.

    That value is found where a row comes closest to the sample; among 61 of them one is near.
    """
    flags = ["--num_dimensions=1", "--columns=61", "--seed=4"]
    file = run("traverse", workdir, tmp_path, *flags)
    own = run("sample", workdir, tmp_path, "--num_samples=1", "--seed=4")
    np.testing.assert_array_equal(file["label"], np.zeros(61))
    distances = np.abs(file["images"].astype(float) - own["images"][0]).mean(axis=(1, 2, 3))
    assert distances.min() < 1.0
    other = run("traverse", workdir, tmp_path, *flags[:2], "--seed=5")["images"]
    assert np.abs(other.astype(float) - own["images"][0]).mean(axis=(1, 2, 3)).min() > 8.0


def test_it_begins_at_images(workdir, tmp_path):
    """Each in turn: a short way from its own noise it is nearly the image; pictures need a label."""
    made = run("sample", workdir, tmp_path, "--num_samples=2", "--seed=4", "--label=7")
    np.savez(tmp_path / "begin.npz", images=made["images"], label=made["label"])
    flags = [f"--images={tmp_path / 'begin.npz'}", "--steps=200", "--threshold=none", "--dimensions=10"]
    file = run("traverse", workdir, tmp_path, *flags, "--range=0.5", "--columns=2")
    assert (file["label"] == 7).all()
    for i in (0, 1):
        near = file["images"][2 * i : 2 * i + 2].astype(float) - made["images"][i]
        far = file["images"][2 * i : 2 * i + 2].astype(float) - made["images"][1 - i]
        assert np.abs(near).mean() < 12.0 < np.abs(far).mean()


def test_the_picture_has_a_row_a_dimension(workdir, tmp_path):
    out, file = tmp_path / "t.png", run("traverse", workdir, tmp_path, *WIDE)
    assert main(["traverse", f"--workdir={workdir}", f"--out={out}", *WIDE]) == 0
    with Image.open(out) as picture:
        shown = np.asarray(picture)
    scale = shown.shape[1] // (5 * 9)  # five columns of eight pixels and a line
    cells = shown[::scale, ::scale].reshape(3, 9, 5, 9).swapaxes(1, 2)[:, :, :8, :8]
    np.testing.assert_array_equal(cells.reshape(15, 8, 8), file["images"][..., 0])


# ------------------------------------------------------------------------------------------ every other family


def test_every_family_is_traversed(of_family, tmp_path):
    """The first ten dimensions; another label makes other images."""
    flags = ["--columns=3", "--batch_size=32"]
    file = run("traverse", of_family[1], tmp_path, *flags)
    np.testing.assert_array_equal(file["dimension"], np.repeat(np.arange(10), 3))
    np.testing.assert_array_equal(file["value"], np.tile([-3.0, 0.0, 3.0], 10).astype(np.float32))
    assert len(np.unique(file["images"], axis=0)) > 10
    assert (run("traverse", of_family[1], tmp_path, *flags, "--label=5")["images"] != file["images"]).any()


def test_between_seeds_every_family_goes_from_sample_to_sample(of_family, tmp_path):
    """Of a GAN under truncation, too, which both commands read alike."""
    more = ["--label=4", "--batch_size=8", *(["--truncation=normal(bound=0.5)"] if of_family[0] == "gan" else [])]
    own = lambda command, *flags: run(command, of_family[1], tmp_path, *more, *flags)["images"]
    frames = own("edit", "--edit=interpolate", "--seeds=5,6", "--frames=3").astype(float)
    ends = np.concatenate([own("sample", "--num_samples=1", f"--seed={seed}") for seed in (5, 6)])
    np.testing.assert_allclose(frames[[0, 2]], ends, atol=16.0)  # rounded to one level
    assert (ends[0] != ends[1]).any()


@pytest.mark.parametrize(
    ("command", "count"),
    [
        ("traverse --num_dimensions=1", 14),
        ("edit --edit=reconstruct", 2),
        ("edit --edit=interpolate --label=1 --frames=3", 3),
    ],
)
def test_images_are_encoded_where_the_family_can(of_family, tmp_path, capsys, command, count):
    """A GAN cannot, and says so."""
    name, workdir = of_family
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "two.npz", images=images, label=np.arange(2, dtype=np.int32))
    command, *flags = [*command.split(), f"--images={tmp_path / 'two.npz'}", "--batch_size=8"]
    if name == "gan":
        assert main([command, f"--workdir={workdir}", f"--out={tmp_path / 'y.npz'}", *flags]) == 2
        assert "the family gan has no encoder" in capsys.readouterr().err
    else:
        assert len(run(command, workdir, tmp_path, *flags)["images"]) == count


@pytest.mark.parametrize("of_family", ["vae"], indirect=True)  # the family that has an encoder
@pytest.mark.parametrize("command", ["traverse --num_dimensions=1", "edit --edit=reconstruct"])
def test_where_images_are_encoded_the_mean_is_shown(of_family, tmp_path, command):
    """Unless --show says otherwise: a draw lies around it, and is another for another seed."""
    _, workdir = of_family
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "two.npz", images=images, label=np.arange(2, dtype=np.int32))
    command, *flags = [*command.split(), f"--images={tmp_path / 'two.npz'}", "--batch_size=8"]
    plain, mean, drawn, again = (
        run(command, workdir, tmp_path, *flags, *more)["images"]
        for more in ([], ["--show=mean"], ["--show=draw"], ["--show=draw", "--seed=1"])
    )
    np.testing.assert_array_equal(plain, mean)
    assert np.mean(drawn != mean) > 0.1
    assert np.mean(drawn != again) > 0.1


@pytest.mark.parametrize("of_family", ["vae"], indirect=True)
def test_a_judged_reconstruction_is_the_mean(of_family):
    """As `edit --edit=reconstruct` shows it: the seed draws nothing, whatever `sample.show` says."""
    _, workdir = of_family
    opened = open_run(str(workdir))
    weights, _ = load_weights(opened, str(workdir), "main", None)
    other = replace(opened, settings=replace(opened.settings, seed=7))
    assert opened.settings.sampling["show"] == "draw"
    assert opened.reconstruction(weights, 60) == other.reconstruction(weights, 60)


# ------------------------------------------------------------------------------------------ transformers, tokenizers


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """Flags of an inpainting: two images, and a mask whose right half is to be made."""
    directory = tmp_path_factory.mktemp("halves")
    grey = np.random.default_rng(0).integers(0, 17, (2, 8, 8, 1)) * (255 / 16)
    np.savez(directory / "two.npz", images=np.rint(grey).astype(np.uint8), label=np.arange(2, dtype=np.int32))
    Image.fromarray(np.repeat(np.uint8([[0] * 4 + [255] * 4]), 8, axis=0)).save(directory / "mask.png")
    return ["--edit=inpaint", f"--images={directory / 'two.npz'}", f"--mask={directory / 'mask.png'}"]


def test_masked_tokens_are_filled_in(halves, tmp_path, capsys):
    """What is known stays to the bit, what is made depends on the seed; no step is walked again."""
    workdir, flags = drawn("transformer-maskgit", tmp_path / "run"), [*halves, "--batch_size=8"]
    first, second = (run("edit", workdir, tmp_path, *flags, f"--seed={seed}")["images"] for seed in (0, 1))
    with np.load(halves[1].partition("=")[2]) as file:
        given = file["images"]
    for made in (first, second):
        np.testing.assert_array_equal(made[:, :, :4], given[:, :, :4])
        assert np.mean(made[:, :, 4:] != given[:, :, 4:]) > 0.5
    assert np.mean(first[:, :, 4:] != second[:, :, 4:]) > 0.5
    capsys.readouterr()
    assert main(["edit", f"--workdir={workdir}", f"--out={tmp_path / 'y.npz'}", *flags, "--resamplings=2"]) == 2
    assert "--resamplings = 2: the family transformer walks no step again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "more", "words"),
    [
        ("transformer", [], "a transformer that decodes by maskgit or mar"),
        ("diffusion", ["--config.family.tokenizer=patches(size=2)"], "diffusion over pixels has it"),
    ],
)
def test_a_run_that_cannot_inpaint_says_which_can(halves, tmp_path, capsys, name, more, words):
    """Others of its family do."""
    workdir = drawn(name, tmp_path / "run", *more)
    assert main(["edit", f"--workdir={workdir}", f"--out={tmp_path / 'x.npz'}", *halves]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"--edit = 'inpaint': the family {name} does not have it in this run; " in line
    assert words in line


def test_a_tokenizer_asks_for_no_label(tmp_path):
    """Though its data has classes: it looks at none."""
    workdir = drawn("tokenizer", tmp_path / "run")
    for i in (0, 1):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8), np.uint8)).save(tmp_path / f"{i}.png")
    pictures = f"--images={tmp_path / '0.png'},{tmp_path / '1.png'}"
    plain = run("edit", workdir, tmp_path, "--edit=reconstruct", pictures, "--batch_size=8")
    assert plain["images"].shape == plain["original"].shape == (2, 8, 8, 1)
    assert "label" not in plain
    walked = run("traverse", workdir, tmp_path, pictures, "--dimensions=3", "--columns=3", "--batch_size=8")
    assert walked["images"].shape == (6, 8, 8, 1)
    assert "label" not in walked


# ------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--dimensions=0,64"], ["--dimensions = '0,64'", "[0, 64)"]),
        (["--dimensions=0,-1"], ["--dimensions = '0,-1'", "whole numbers"]),
        (["--dimensions=a"], ["--dimensions = 'a'", "whole numbers"]),
        (["--dimensions="], ["--dimensions", "whole numbers"]),
        (["--dimensions=1", "--num_dimensions=2"], ["--num_dimensions = 2", "--dimensions"]),
        (["--num_dimensions=65"], ["--num_dimensions = 65", "[1, 64]"]),
        (["--num_dimensions=0"], ["--num_dimensions = 0", "[1, 64]"]),
        (["--range=0"], ["--range = 0.0", "positive"]),
        (["--range=nan"], ["--range = nan", "positive"]),
        (["--columns=1"], ["--columns", "2"]),
        (["--label=10"], ["--label=10", "[0, 10)"]),
        (["--images=nothing.npz"], ["nothing.npz"]),
        (["--images=IMAGES", "--solver=ddpm"], ["sample.solver = 'ddpm'", "draws noise"]),
        (["--images=IMAGES", "--temperature=1.1"], ["--temperature = 1.1", "are encoded"]),
        (["--images=PICTURE"], ["--label is missing", "10 classes"]),
        (["--out=x.gif"], ["--out", ".npz or .png"]),
    ],
)
def test_traverse_refuses(workdir, tmp_path, capsys, flags, words):
    np.savez(tmp_path / "images.npz", images=np.zeros((1, 8, 8, 1), np.uint8), label=np.zeros(1, np.int32))
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "picture.png")
    places = {"IMAGES": str(tmp_path / "images.npz"), "PICTURE": str(tmp_path / "picture.png")}
    for name, path in places.items():
        flags = [flag.replace(name, path) for flag in flags]
    assert main(["traverse", f"--workdir={workdir}", f"--out={tmp_path / 'y.npz'}", *flags]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert all(word in line for word in words), line
    assert not (tmp_path / "y.npz").exists()


@pytest.mark.parametrize("command", ["sample", "edit", "traverse"])
def test_help_names_the_rows_of_what_gans_and_vaes_show(capsys, command):
    assert main([command, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for flag, known in (("truncation", gan.TRUNCATIONS), ("show", vae.SHOWN)):
        assert f"Rows: {', '.join(sorted(known))} " in text.split(f" --{flag} ")[-1]


def test_what_a_family_cannot_do_is_said_before_anything_is_drawn(of_family, tmp_path, capsys):
    """No walk from noise to an image; bits per dimension from the VAE alone."""
    name, workdir = of_family
    assert main(["sample", f"--workdir={workdir}", f"--out={tmp_path / 'x.npz'}", "--trajectory"]) == 2
    assert f"--trajectory: the family {name} does not walk" in capsys.readouterr().err
    if name == "gan":
        assert main(["evaluate", f"--workdir={workdir}", "--likelihood=5"]) == 2
        assert "--likelihood = 5: gan has no likelihood" in capsys.readouterr().err
