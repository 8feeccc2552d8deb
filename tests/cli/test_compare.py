"""Runs side by side, from training to the table; and those that do not compare."""

import csv
import json
import shutil

import pytest
from PIL import Image

from diffusion_jax.cli.main import main

pytestmark = pytest.mark.usefixtures("quick_compilation")

STEPS = 20
BATCH = 16


DIFFUSION = ["--config.family.network=dit(patch=4,width=16,depth=1,heads=2)", "--config.sample.steps=3"]
GAN = [
    "--config.family.generator=resnet(width=8,multipliers=(1,),latent=4,embedding=4)",
    "--config.family.discriminator=resnet(width=8,multipliers=(1,),blocks=0)",
    "--config.family.regularisers=",
]
VAE = [
    "--config.family.network=flat(latents=4,channels=8,multipliers=(1,))",
    "--config.family.likelihood=importance(draws=2)",
]


def train(workdir, family, *flags):
    given = [
        f"--config=configs/digits.py:{family}",
        "--config.sample.batch_size=64",
        f"--config.train.batch_size={BATCH}",
        "--config.train.log_every=10",
        "--config.evaluate.num_samples=60",
        "--config.evaluate.bootstrap=10",
    ]
    assert main(["train", *given, *flags, f"--workdir={workdir}"]) == 0


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs that differ in their seed."""
    directory = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate("ab"):
        train(directory / name, "diffusion", *DIFFUSION, f"--config.train.steps={STEPS}", f"--config.seed={seed}")
    return directory


@pytest.fixture(scope="module")
def families(runs):
    """The same directory, with a GAN and a VAE beside them."""
    for name, flags in (("gan", GAN), ("vae", VAE)):
        train(runs / name, name, *flags, "--config.train.steps=4")
    return runs


def compare(directory, names, *flags):
    workdirs = ",".join(str(directory / name) for name in names)
    return main(["compare", f"--workdirs={workdirs}", *flags])


def evaluation(workdir):
    return json.loads((workdir / "evaluation.json").read_text())


def test_an_evaluation_says_what_the_run_has_cost(runs):
    """Three steps of Heun, at t = 1, 4/9, 1/9, are five evaluations, of which four lie at t <= 0.7: guided, and two."""
    found = evaluation(runs / "a")["cost"]
    assert found["training"]["images"] == STEPS * BATCH
    last = json.loads((runs / "a" / "metrics.jsonl").read_text().splitlines()[-1])
    assert found["training"]["seconds"] == last["seconds"] > 0.0
    assert found["sampling"]["evaluations"] == 1 + 4 * 2
    assert found["sampling"]["seconds"] > 0.0
    # Of each image forward and backward, one and a half times what one evaluation takes twice, near enough.
    once = found["sampling"]["flops"] / found["sampling"]["evaluations"]
    assert found["training"]["flops"] == pytest.approx(3.0 * once * STEPS * BATCH, rel=0.1)
    assert found["parameters"]["total"] == found["parameters"]["players"]["denoiser"]


def test_the_table_holds_what_the_evaluations_say(runs, tmp_path, capsys):
    assert compare(runs, "ab", f"--out={tmp_path}", "--likelihood=60", "--steps=1,2", "--json") == 0
    printed = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    with (tmp_path / "compare.csv").open() as file:
        rows = list(csv.DictReader(file))
    text = (tmp_path / "compare.md").read_text()
    assert [row["run"] for row in rows] == ["a", "b"]
    for row in rows:
        expected = evaluation(runs / row["run"])
        for name, figure in expected["metrics"].items():
            assert float(row[name]) == figure["value"]
            assert [float(row[f"{name}_low"]), float(row[f"{name}_high"])] == figure["interval"]
            assert float(row[f"{name}_floor"]) == figure["floor"]
            assert f"{figure['value']:.4g}" in text
        assert int(row["parameters"]) == expected["cost"]["parameters"]["total"]
        assert float(row["training_flops"]) == expected["cost"]["training"]["flops"]
        assert 0.0 < float(row["bits_per_dimension"]) < 20.0
        assert row["dequantised"] == "False"
    assert "60 held-out images, given the labels that they have, discrete, not dequantised" in text
    assert [record["frechet"] for record in printed["runs"]] == [float(row["frechet"]) for row in rows]
    # One step of Heun is one evaluation at t = 1, unguided; two are that and two guided ones at t = 1/4.
    asked = [(row["run"], row["steps"], row["sampling_evaluations"]) for row in printed["steps"]]
    assert asked == [("a", 1, 1), ("a", 2, 5), ("b", 1, 1), ("b", 2, 5)]
    for name in ("samples.png", "quality.png", "losses.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 100


@pytest.mark.slow
def test_families_stand_side_by_side(families, tmp_path, capsys):
    """A GAN has two players and no likelihood, a VAE bounds its own, and only diffusion samples in steps."""
    assert compare(families, ("gan", "vae", "a"), f"--out={tmp_path}", "--likelihood=20", "--steps=1", "--json") == 0
    printed = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    gan, vae, diffusion = printed["runs"]
    assert [row["family"] for row in printed["runs"]] == ["gan", "vae", "diffusion"]
    assert gan["bits_per_dimension"] is None
    assert 0.0 < vae["bits_per_dimension"] < 20.0
    assert 0.0 < diffusion["bits_per_dimension"] < 20.0
    players = dict(player.split() for player in gan["players"].split(" + "))
    assert set(players) == {"generator", "discriminator"}
    assert sum(map(int, players.values())) == gan["parameters"]
    assert (gan["sampling_evaluations"], vae["sampling_evaluations"]) == (1, 1)
    assert [row["run"] for row in printed["steps"]] == ["a"]
    text = (tmp_path / "compare.md").read_text()
    (bits,) = (line for line in text.splitlines() if "bits per dimension ↓" in line)
    assert [cell.strip() == "-" for cell in bits.strip("|").split("|")[1:4]] == [True, False, False]
    assert "Bits per dimension of gan" not in text
    assert "Bits per dimension of vae: an upper bound in the mean, by importance(draws=2), of 20 held-out" in text
    assert "Bits per dimension of a: " in text


def test_nothing_that_stands_in_the_directory_is_lost(runs, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "compare.md").write_text("an older table")
    for _ in range(2):
        assert compare(runs, "ab", f"--out={tmp_path}", "--likelihood=0") == 0
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "compare.before-0.md").read_text() == "an older table"
    assert not list(tmp_path.glob("*.before-1.*"))
    assert not list(tmp_path.glob("compare.before-*.csv"))


def test_bits_per_dimension_are_left_out_where_nobody_asks(runs, tmp_path):
    assert compare(runs, "ab", f"--out={tmp_path}", "--likelihood=0") == 0
    with (tmp_path / "compare.csv").open() as file:
        assert [row["bits_per_dimension"] for row in csv.DictReader(file)] == ["", ""]


# ------------------------------------------------------------------------------------------ refused


def change(file, path, value):
    """Set a field of a JSON file; the path's names stand between dots."""
    content = json.loads(file.read_text())
    *sections, name = path.split(".")
    section = content
    for key in sections:
        section = section[key]
    section[name] = value
    file.write_text(json.dumps(content))


def refused(capsys, directory, names, out):
    capsys.readouterr()
    assert compare(directory, names, f"--out={out}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert not out.exists()
    return line


@pytest.mark.parametrize(
    ("file", "path", "value"),
    [
        ("config.json", "data.name", "stacked_digits"),
        ("config.json", "data.held_out_split", "validation"),
        ("config.json", "data.labels", False),
        ("evaluation.json", "num_samples", 61),
        ("evaluation.json", "bootstrap", 11),
        ("evaluation.json", "features.fingerprint", "0000"),
        ("evaluation.json", "metrics.frechet.floor", 0.5),
    ],
)
def test_runs_that_differ_in_data_or_evaluation_are_refused(runs, tmp_path, capsys, file, path, value):
    for name in "ab":
        shutil.copytree(runs / name, tmp_path / name)
    change(tmp_path / "b" / file, path, value)
    line = refused(capsys, tmp_path, "ab", tmp_path / "out")
    assert path in line
    assert str(value) in line


def test_images_of_another_size_are_refused(runs, tmp_path, capsys):
    """By what the checkpoint says of them; a config's 0 may stand for any size."""
    for name in "ab":
        shutil.copytree(runs / name, tmp_path / name)
    change(tmp_path / "b" / "checkpoints" / str(STEPS) / "about" / "metadata", "spec.size", 16)
    assert "data.image_size is 8 for a and 16 for b" in refused(capsys, tmp_path, "ab", tmp_path / "out")


def test_a_run_without_an_evaluation_is_told_what_to_run(runs, tmp_path, capsys):
    for name in "ab":
        shutil.copytree(runs / name, tmp_path / name)
    again = f"diffusion-jax evaluate --workdir={tmp_path / 'b'}"
    change(tmp_path / "b" / "evaluation.json", "step", 19)
    line = refused(capsys, tmp_path, "ab", tmp_path / "out")
    assert "step 19" in line
    assert again in line
    (tmp_path / "b" / "evaluation.json").unlink()
    assert again in refused(capsys, tmp_path, "ab", tmp_path / "out")
    shutil.rmtree(tmp_path / "b")
    assert f"{tmp_path / 'b'}: there is no run here" in refused(capsys, tmp_path, "ab", tmp_path / "out")


FOREIGN = {
    ("config.json", "{"): "cannot be read as JSON",
    ("config.json", "{}"): "config.json is not that of a run",
    ("config.json", '{"family": 3}'): "config.json is not that of a run",
    ("config.json", '{"family": {"name": "poetry"}}'): "config.json is not that of a run",
    ("config.json", '{"family": {"name": "gan"}, "data": 3}'): "config.json is not that of a run",
    ("evaluation.json", '{"step": 20'): "cannot be read as JSON",
    ("evaluation.json", "[1, 2]"): "holds no JSON object",
    ("evaluation.json", '{"cost": 3}'): "it has no step",
    ("evaluation.json", '{"cost": {}, "step": "last"}'): "its step is 'last'",
}


@pytest.mark.parametrize(("file", "content"), FOREIGN, ids=[" ".join(key) for key in FOREIGN])
def test_files_of_another_kind_are_refused(tmp_path, capsys, file, content):
    """In one sentence that names the file, before anything is opened."""
    config = '{"family": {"name": "gan"}}'
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
    (tmp_path / "a" / file).write_text(content)
    line = refused(capsys, tmp_path, "ab", tmp_path / "out")
    assert FOREIGN[file, content] in line
    assert str(tmp_path / "a") in line


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("num_samples", "60", "its num_samples is '60'"),
        ("cost.training.images", None, "its cost.training.images is None"),
        ("cost.sampling", [], "it has no cost.sampling."),
        ("metrics.kid.interval", [0.1], "it has no metrics.kid.interval.1"),
        ("metrics", [], "it has no metrics.frechet.value"),
        ("features.fingerprint", True, "its features.fingerprint is True"),
    ],
)
def test_an_evaluation_that_is_not_whole_is_refused(runs, tmp_path, capsys, path, value, says):
    for name in "ab":
        shutil.copytree(runs / name, tmp_path / name)
    change(tmp_path / "b" / "evaluation.json", path, value)
    line = refused(capsys, tmp_path, "ab", tmp_path / "out")
    assert says in line
    assert f"diffusion-jax evaluate --workdir={tmp_path / 'b'}" in line


@pytest.mark.parametrize("names", ["a", "aa"])
def test_a_run_alone_is_refused(runs, tmp_path, capsys, names):
    assert "two runs or more" in refused(capsys, runs, names, tmp_path / "out")


def test_a_file_in_the_place_of_the_directory_is_refused(runs, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert compare(runs, "ab", f"--out={tmp_path / 'file'}") == 2
    assert "is a file" in capsys.readouterr().err
