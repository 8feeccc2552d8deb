"""Edits, trajectories, averages chosen afterwards, guidance by other networks: the commands that need no training."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from diffusion_jax import families
from diffusion_jax.cli import train
from diffusion_jax.cli.main import main

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY = [
    "--config=configs/digits.py:diffusion",
    "--config.family.network=dit(patch=4,width=32,depth=1,heads=2)",
    "--config.family.classifier=dit(patch=4,width=32,depth=1,heads=2)",
    "--config.train.batch_size=16",
    "--config.train.log_every=10",
    "--config.train.steps=40",
    "--config.train.ema.main=power(std=0.1)",
    "--config.checkpoint.every=5",
    "--config.checkpoint.keep_every=5",
    "--config.sample.every=0",
    "--config.sample.steps=3",
    "--config.sample.batch_size=16",
    "--config.evaluate.every=0",
    "--config.evaluate.num_samples=50",
    "--config.evaluate.bootstrap=10",
]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "finish", lambda *args: None)  # nobody here reads the evaluation
        assert main(["train", *TINY, f"--workdir={directory}"]) == 0
    return directory


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Six held-out digits and a mask whose right half is to be made."""
    directory = tmp_path_factory.mktemp("pictures")
    digits = load_digits()
    images = np.rint(digits.images[2:20:3] * (255 / 16)).astype(np.uint8)[..., None]
    np.savez(directory / "images.npz", images=images, label=digits.target[2:20:3].astype(np.int32))
    mask = np.zeros((8, 8), np.uint8)
    mask[:, 4:] = 255
    Image.fromarray(mask).save(directory / "mask.png")
    return directory


def run(command, workdir, tmp_path, *flags):
    assert main([command, f"--workdir={workdir}", f"--out={tmp_path / 'x.npz'}", *flags]) == 0
    with np.load(tmp_path / "x.npz") as file:
        return dict(file)


def load(pictures):
    with np.load(pictures / "images.npz") as file:
        return dict(file)


def test_a_reconstruction_is_beside_its_original(workdir, pictures, tmp_path):
    """There and back by the ODE, up to the solver's error, under the images' own labels."""
    given, flag = load(pictures), f"--images={pictures / 'images.npz'}"
    flags = ["--edit=reconstruct", flag, "--steps=200", "--threshold=none"]
    file = run("edit", workdir, tmp_path, *flags)
    np.testing.assert_array_equal(file["original"], given["images"])
    np.testing.assert_array_equal(file["label"], given["label"])
    assert np.abs(file["images"].astype(float) - given["images"]).mean() < 8.0  # half a grey level of the digits' 17
    assert json.loads(str(file["about"]))["edit"]["name"] == "reconstruct"
    assert main(["edit", f"--workdir={workdir}", *flags, f"--out={tmp_path / 'r.png'}"]) == 0
    with Image.open(tmp_path / "r.png") as picture:
        shown = np.asarray(picture)
    scale = shown.shape[1] // (10 * 9)  # ten columns of eight pixels and a line
    cells = shown[::scale, ::scale].reshape(2, 9, 10, 9).swapaxes(1, 2).reshape(20, 9, 9)[:12, :8, :8]
    np.testing.assert_array_equal(cells[0::2], given["images"][..., 0])
    np.testing.assert_array_equal(cells[1::2], file["images"][..., 0])


def test_img2img_goes_from_the_image_to_a_sample(workdir, pictures, tmp_path):
    """Hardly noised it is the image; the further it is noised, the less."""
    images, flag = load(pictures)["images"].astype(float), f"--images={pictures / 'images.npz'}"
    made = [run("edit", workdir, tmp_path, "--edit=img2img", flag, f"--strength={s}") for s in (0.001, 0.3, 1.0)]
    distances = [np.abs(file["images"] - images).mean() for file in made]
    assert distances[0] < 1.0
    assert distances[0] < distances[1] < distances[2]
    np.testing.assert_array_equal(made[0]["label"], load(pictures)["label"])
    assert json.loads(str(made[1]["about"]))["edit"] == {
        "name": "img2img",
        "images": str(pictures / "images.npz"),
        "label": None,
        "strength": 0.3,
    }


def test_inpainting_keeps_what_is_known(workdir, pictures, tmp_path):
    flags = ["--edit=inpaint", f"--images={pictures / 'images.npz'}", f"--mask={pictures / 'mask.png'}", "--label=3"]
    one, two = (run("edit", workdir, tmp_path, *flags, "--resamplings=2", f"--seed={seed}") for seed in (0, 1))
    images = load(pictures)["images"]
    np.testing.assert_array_equal(one["images"][:, :, :4], images[:, :, :4])
    assert np.mean(one["images"][:, :, 4:] != images[:, :, 4:]) > 0.1
    assert np.mean(one["images"] != two["images"]) > 0.1
    assert (one["label"] == 3).all()


def test_translation_to_the_same_label_is_the_image(workdir, pictures, tmp_path):
    """There and back by the ODE, up to the solver's error; to another label it is not."""
    images, flag = load(pictures)["images"].astype(float), f"--images={pictures / 'images.npz'}"
    flags = ["--edit=translate", flag, "--steps=200", "--threshold=none"]
    same = run("edit", workdir, tmp_path, *flags)["images"]
    other = run("edit", workdir, tmp_path, *flags, "--label=7", "--guidance=20.0")["images"]
    assert np.abs(same - images).mean() < 8.0  # half a grey level of the digits' 17
    assert np.abs(other - images).mean() > 2.0 * np.abs(same - images).mean()


def test_interpolation_begins_and_ends_at_its_ends(workdir, pictures, tmp_path):
    ends = [
        run("sample", workdir, tmp_path, "--num_samples=1", "--label=4", f"--seed={s}")["images"][0] for s in (5, 6)
    ]
    between = run("edit", workdir, tmp_path, "--edit=interpolate", "--seeds=5,6", "--label=4", "--frames=7")["images"]
    assert between.shape == (7, 8, 8, 1)
    np.testing.assert_allclose(between[[0, -1]].astype(float), np.stack(ends), atol=16.0)  # rounded to one level
    assert np.abs(between[3].astype(float) - between[0]).mean() > 1.0
    for i, end in enumerate(ends):
        Image.fromarray(end[..., 0]).save(tmp_path / f"{i}.png")
    files = f"--images={tmp_path / '0.png'},{tmp_path / '1.png'}"
    flags = ["--edit=interpolate", files, "--label=4", "--steps=200", "--threshold=none", "--frames=3"]
    images = run("edit", workdir, tmp_path, *flags)["images"].astype(float)
    assert np.abs(images[[0, -1]] - np.stack(ends)).mean() < 8.0


def test_between_images_each_end_has_its_own_label(workdir, pictures, tmp_path):
    """There and back under one label leads to the image itself, if that is the label it was encoded under."""
    given, flags = load(pictures), ["--steps=200", "--threshold=none", "--guidance=20.0"]
    np.savez(tmp_path / "ends.npz", images=given["images"][:2], label=given["label"][:2])
    assert given["label"][0] != given["label"][1]
    file = run(
        "edit", workdir, tmp_path, "--edit=interpolate", f"--images={tmp_path / 'ends.npz'}", "--frames=4", *flags
    )
    np.testing.assert_array_equal(file["label"], np.repeat(given["label"][:2], 2))
    assert np.abs(file["images"][[0, -1]].astype(float) - given["images"][:2]).mean() < 8.0


def test_between_seeds_nothing_is_encoded(workdir, tmp_path):
    """So guidance without an ODE behind it is allowed: frame 0 is what `sample` draws from the first seed."""
    flags = ["--label=4", "--solver=ddim", "--rules=cfg_pp", "--guidance=0.6"]
    frames = run("edit", workdir, tmp_path, "--edit=interpolate", "--seeds=5,6", "--frames=2", *flags)["images"]
    end = run("sample", workdir, tmp_path, "--num_samples=1", "--seed=5", *flags)["images"]
    np.testing.assert_allclose(frames[0].astype(float), end[0], atol=16.0)  # rounded to one level


def test_a_trajectory_ends_in_the_image(workdir, tmp_path):
    file = run("sample", workdir, tmp_path, "--num_samples=5", "--trajectory", "--steps=4")
    assert file["trajectory"].shape == (5, 5, 8, 8, 1)
    shown = np.rint(np.rint((np.clip(file["trajectory"][:, -1], -1, 1) + 1) * 8) * 255 / 16)
    np.testing.assert_allclose(shown, file["images"], atol=16)
    assert np.mean(shown == file["images"]) > 0.99
    assert 0.8 < file["trajectory"][:, 0].std() < 1.2  # noise
    assert (
        main(["sample", f"--workdir={workdir}", "--num_samples=3", "--trajectory", f"--out={tmp_path / 't.png'}"]) == 0
    )
    with Image.open(tmp_path / "t.png") as picture:
        assert picture.width * 3 == picture.height * 4  # 3 rows of 4 stops


def test_flags_of_sampling_reach_the_sampler(workdir, tmp_path):
    plain = run("sample", workdir, tmp_path, "--num_samples=10", "--guidance=20.0")["images"]
    for change in (
        "--grid=cosine",
        "--rules=rescaled(phi=1.0)",
        "--threshold=none",
        "--classifier=3.0",
        "--step=20",
        "--ema=posthoc(std=0.11)",
    ):
        changed = run("sample", workdir, tmp_path, "--num_samples=10", "--guidance=20.0", change)["images"]
        assert (changed != plain).any(), change
    kept = run("sample", workdir, tmp_path, "--num_samples=10", "--guidance=20.0", "--ema=posthoc(std=0.1)")["images"]
    assert np.mean(kept != plain) < 0.01  # the profile that was kept
    stops = run("sample", workdir, tmp_path, "--num_samples=2", "--grid=custom(times=(1.0,0.4))", "--steps=2")
    assert json.loads(str(stops["about"]))["sample"]["grid"] == "custom(times=(1.0,0.4))"


def test_likelihood_of_held_out_images(workdir, tmp_path, capsys):
    """Better than the uniform distribution over 17 levels it need not be after 40 steps, but of its order."""
    flags = ["--likelihood=20", "--json", f"--out={tmp_path / 'e.json'}"]
    assert main(["evaluate", f"--workdir={workdir}", *flags]) == 0
    row = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["bits_per_dimension"]
    assert row["images"] == 20
    assert row["interval"][0] < row["value"] < row["interval"][1]
    assert 1.0 < row["value"] < 3.0 * np.log2(17)


@pytest.mark.slow
def test_autoguidance_pushes_away_from_an_earlier_checkpoint(workdir, tmp_path):
    """One step of DDIM ends in x0 itself, and so three runs lie on a line: pushed = weak + w (strong - weak).

    The strong model is guided; the weak one is the checkpoint of step 10 as `sample` draws from it, unguided.
    """
    flags = ["--num_samples=10", "--trajectory", "--solver=ddim", "--steps=1", "--grid=uniform", "--threshold=none"]
    draw = lambda *more: run("sample", workdir, tmp_path, *flags, "--rules=", *more)
    strong, weak = draw("--guidance=3.0"), draw("--guidance=1.0", "--step=10")
    pushed = draw("--guidance=3.0", f"--weak_workdir={workdir}", "--weak_step=10", "--autoguidance=2.5")
    strong_x0, weak_x0, pushed_x0 = (file["trajectory"][:, -1] for file in (strong, weak, pushed))
    assert np.abs(strong_x0 - weak_x0).mean() > 0.03
    np.testing.assert_allclose(pushed_x0, weak_x0 + 2.5 * (strong_x0 - weak_x0), atol=1e-4)
    assert json.loads(str(pushed["about"]))["weak"] == {"workdir": str(workdir), "step": 10}


def retold(workdir, place, family=(), spec=()):
    """A copy of a run that says something else of its family or of its images."""
    shutil.copytree(workdir, place)
    config = json.loads((place / "config.json").read_text())
    config["family"] |= dict(family)
    (place / "config.json").write_text(json.dumps(config))
    for about in place.glob("checkpoints/*/about/metadata"):
        said = json.loads(about.read_text())
        about.write_text(json.dumps(said | {"spec": said["spec"] | dict(spec)}))
    return place


LEARNED = {"schedule": "learned(hidden=8)", "weighting": "elbo", "time_sampling": "uniform"}


@pytest.mark.parametrize(
    ("ours", "theirs", "flags", "words"),
    [
        ({}, {}, [], ["sample.autoguidance is 1", "--autoguidance=2"]),
        ({}, {}, ["--autoguidance=1.0"], ["sample.autoguidance is 1"]),
        ({}, {}, ["--autoguidance=2.0", "--weak_step=7"], ["--weak_step=7", "5, 10"]),
        ({}, {"family": {"schedule": "cosine"}}, ["--autoguidance=2.0"], ["family.schedule", "cosine"]),
        ({"family": LEARNED}, {"family": LEARNED}, ["--autoguidance=2.0"], ["schedule is learned"]),
        ({}, {"spec": {"num_classes": 5}}, ["--autoguidance=2.0"], ["its classes"]),
        ({}, {"spec": {"size": 16}}, ["--autoguidance=2.0"], ["another size"]),
    ],
    ids=["no-weight", "weight-one", "no-step", "schedule", "learned", "classes", "size"],
)
def test_autoguidance_refuses_a_run_that_is_no_worse_model_of_the_same(
    workdir, tmp_path, capsys, ours, theirs, flags, words
):
    own, weak = retold(workdir, tmp_path / "own", **ours), retold(workdir, tmp_path / "weak", **theirs)
    flags = [f"--workdir={own}", f"--weak_workdir={weak}", f"--out={tmp_path / 'y.npz'}", *flags]
    assert main(["sample", *flags]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert all(word in line for word in ["weak_", *words]), line
    assert not (tmp_path / "y.npz").exists()


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["rectified_flow()", None])
def test_the_worse_models_schedule_may_be_written_otherwise(workdir, tmp_path, schedule):
    """The rows must be equal, not their texts; and a field that a config leaves out has its default."""
    weak = retold(workdir, tmp_path / "weak", family={"schedule": schedule})
    if schedule is None:
        config = json.loads((weak / "config.json").read_text())
        del config["family"]["schedule"]
        (weak / "config.json").write_text(json.dumps(config))
    flags = [f"--weak_workdir={weak}", "--weak_step=10", "--autoguidance=2.0", "--num_samples=2"]
    assert run("sample", workdir, tmp_path, *flags)["images"].shape == (2, 8, 8, 1)


@pytest.mark.parametrize("flag", ["--autoguidance=2.0", "--autoguidance_rules=apg"])
def test_autoguidance_needs_a_worse_model(workdir, tmp_path, capsys, flag):
    assert main(["sample", f"--workdir={workdir}", f"--out={tmp_path / 'y.npz'}", flag]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert flag.split("=")[0] in line
    assert "--weak_workdir" in line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["--edit is missing"]),
        (["--edit=paint"], ["--edit = 'paint'", "inpaint"]),
        (["--edit=img2img"], ["--images is missing"]),
        (["--edit=img2img", "--images=IMAGES", "--strength=1.5"], ["--strength = 1.5"]),
        (["--edit=img2img", "--images=IMAGES", "--strength=0"], ["--strength = 0.0: must be above 0 and at most 1."]),
        (["--edit=img2img", "--images=IMAGES", "--mask=MASK"], ["--mask", "img2img does not read"]),
        (["--edit=img2img", "--images=nothing.npz"], ["nothing.npz"]),
        (["--edit=reconstruct"], ["--images is missing"]),
        (["--edit=reconstruct", "--images=IMAGES", "--strength=0.5"], ["--strength", "reconstruct does not read"]),
        (["--edit=reconstruct", "--images=IMAGES", "--temperature=1.1"], ["--temperature = 1.1", "are encoded"]),
        (["--edit=reconstruct", "--images=IMAGES", "--solver=ddpm"], ["sample.solver = 'ddpm'", "draws noise"]),
        (["--edit=img2img", "--images=MASK"], ["--label is missing", "10 classes"]),
        (["--edit=img2img", "--images=MASK", "--label=10"], ["--label=10", "[0, 10)"]),
        (["--edit=inpaint", "--images=IMAGES"], ["--mask is missing"]),
        (["--edit=inpaint", "--images=IMAGES", "--mask=IMAGES"], ["--mask", "no picture"]),
        (["--edit=inpaint", "--images=IMAGES", "--mask=MASK", "--resamplings=0"], ["--resamplings = 0"]),
        (["--edit=translate", "--images=IMAGES", "--solver=ddpm"], ["sample.solver = 'ddpm'", "draws noise"]),
        (
            ["--edit=translate", "--images=IMAGES", "--solver=ddim", "--rules=cfg_pp"],
            ["sample.rules = 'cfg_pp'", "no ODE", "encoded"],
        ),
        (
            ["--edit=interpolate", "--images=MASK,MASK", "--label=1", "--solver=ddim", "--rules=interval+cfg_pp"],
            ["sample.rules = 'interval+cfg_pp'", "no ODE"],
        ),
        (
            [
                *("--edit=translate", "--images=IMAGES", "--solver=ddim"),
                *("--weak_workdir=WORKDIR", "--autoguidance=2.0", "--autoguidance_rules=cfg_pp"),
            ],
            ["sample.autoguidance_rules = 'cfg_pp'", "no ODE"],
        ),
        (["--edit=interpolate", "--seeds=1"], ["--seeds = '1'", "two"]),
        (["--edit=interpolate", "--seeds=1,x"], ["--seeds = '1,x'"]),
        (["--edit=interpolate", "--images=IMAGES", "--label=1"], ["--images", "two images"]),
        (["--edit=interpolate", "--images="], ["--edit = 'interpolate'", "two seeds"]),
        (["--edit=interpolate", "--seeds=1,2", "--label=1", "--solver=ddpm"], ["sample.solver = 'ddpm'"]),
        (["--edit=interpolate"], ["--edit = 'interpolate'", "two seeds", "--seeds=0,1", "two --images"]),
        (["--edit=interpolate", "--images=IMAGES", "--seeds=1,2"], ["--edit = 'interpolate'", "not both"]),
        (["--edit=interpolate", "--images=MASK,MASK"], ["--label is missing", "the images have no labels"]),
        (["--edit=interpolate", "--seeds=1,2", "--label=10"], ["--label=10", "[0, 10)"]),
    ],
)
def test_edit_refuses(workdir, pictures, tmp_path, capsys, flags, words):
    places = {"IMAGES": str(pictures / "images.npz"), "MASK": str(pictures / "mask.png"), "WORKDIR": str(workdir)}
    for name, path in places.items():
        flags = [flag.replace(name, path) for flag in flags]
    assert main(["edit", f"--workdir={workdir}", f"--out={tmp_path / 'y.npz'}", *flags]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert all(word in lines[0] for word in words), lines[0]
    assert not (tmp_path / "y.npz").exists()


@pytest.fixture
def one_way(monkeypatch):
    """A family of another name whose images have a latent, but no way back to it, as a GAN's."""
    build = families.build

    def shorn(*args):
        family = build(*args)
        latent = dataclasses.replace(family.latent, encode=None)
        return dataclasses.replace(family, name="oneway", latent=latent, edits={}, denoise=None)

    monkeypatch.setattr(families, "build", shorn)


@pytest.mark.parametrize("edit", ["reconstruct", "translate", "interpolate", "img2img", "inpaint"])
def test_what_a_family_cannot_do_is_refused_by_its_name(one_way, workdir, pictures, tmp_path, capsys, edit):
    flags = ["--label=1", f"--images={pictures / 'images.npz'}"]
    flags += [f"--mask={pictures / 'mask.png'}"] if edit == "inpaint" else []
    assert main(["edit", f"--workdir={workdir}", f"--out={tmp_path / 'y.npz'}", f"--edit={edit}", *flags]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"--edit = '{edit}': the family oneway " in line


def test_seeds_of_a_family_without_encoder_are_interpolated(one_way, workdir, tmp_path):
    """Without --label, as `sample` makes image 0: of class 0."""
    file = run("edit", workdir, tmp_path, "--edit=interpolate", "--seeds=5,6", "--frames=2")
    np.testing.assert_array_equal(file["label"], [0, 0])
    for seed, frame in zip((5, 6), file["images"].astype(float), strict=True):
        end = run("sample", workdir, tmp_path, "--num_samples=1", f"--seed={seed}")
        np.testing.assert_array_equal(end["label"], [0])
        np.testing.assert_allclose(frame, end["images"][0], atol=16.0)  # rounded to one level


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--grid=custom(times=(1.0,0.4)) --steps=3", ["sample.steps = 3", "has 2 steps"]),
        ("--rules=apg+", ["sample.rules = 'apg+'", "each side of a +"]),
        ("--rules=intervall", ["sample.rules", "did you mean 'interval'"]),
        ("--threshold=dynamic(quantile=2.0)", ["sample.threshold", "quantile"]),
        ("--ema=posthoc(std=0.5)", ["--ema", "std"]),
        ("--ema=posthoc(std=0.005)", ["posthoc(std=0.005)", "40"]),
        ("--weak_workdir=nowhere", ["--weak_workdir=nowhere"]),
        ("--weak_step=5", ["--weak_step = 5", "--weak_workdir"]),
    ],
)
def test_sample_refuses(workdir, tmp_path, capsys, flags, words):
    assert main(["sample", f"--workdir={workdir}", f"--out={tmp_path / 'y.npz'}", *flags.split()]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert all(word in line for word in words), line
