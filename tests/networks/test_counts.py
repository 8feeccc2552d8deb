"""Parameters of the published networks, counted without allocating any."""

import jax
import pytest

from diffusion_jax import networks, tree
from diffusion_jax.networks import flops, gan
from diffusion_jax.networks.presets import PAIRS, PRESETS

PUBLISHED = {
    # facebookresearch/DiT: 256, 64 or 16 positions in a fixed table among them
    "dit-s/2": 32_963_360,
    "dit-s/4": 32_945_024,
    "dit-s/8": 33_148_160,
    "dit-b/2": 130_512_416,
    "dit-b/4": 130_475_648,
    "dit-b/8": 130_881_536,
    "dit-l/2": 458_102_816,
    "dit-l/4": 458_053_760,
    "dit-l/8": 458_594_816,
    "dit-xl/2": 675_129_632,
    "dit-xl/4": 675_074_432,
    "dit-xl/8": 675_683_072,
    # hojonathanho/diffusion, "35.7 million" in the paper's appendix B
    "ddpm-cifar10": 35_746_307,
    "ddpm-256": 113_673_219,
    # openai/improved-diffusion and openai/guided-diffusion, their UNetModel with the READMEs' flags
    "iddpm-cifar10": 52_546_438,
    "adm-64": 295_904_454,
    "adm-128": 421_529_606,
    "adm-256": 553_838_086,
    "adm-512": 558_997_638,
    # NVlabs/edm, DhariwalUNet of 1,000 classes
    "edm-imagenet64": 295_899_267,
    # NVlabs/edm, SongUNet: of 10 classes for CIFAR-10, of none for FFHQ, 9 augmentation labels
    "edm-cifar10": 55_735_299,
    "ncsnpp-cifar10": 56_400_643,
    "edm-ffhq64": 61_805_571,
    # NVlabs/edm2, Precond(64, 4, 1000): the U-Net and the head of the log variance; "125, 280, 498, 778, 1119, 1523 M"
    "edm2-xs": 124_713_253,
    "edm2-s": 280_212_837,
    "edm2-m": 497_807_781,
    "edm2-l": 777_498_085,
    "edm2-xl": 1_119_283_749,
    "edm2-xxl": 1_523_164_773,
    # baofff/U-ViT, libs/uvit.py with the configs' options; "44, 44, 131, 287, 287, 501 M" in the paper's Table 2
    "uvit-s/2": 44_255_328,
    "uvit-s/4": 44_292_228,
    "uvit-m/4": 130_940_292,
    "uvit-l/4": 286_827_652,
    "uvit-l/2": 286_763_172,
    "uvit-h/2": 500_832_016,
    # google-research/vdm: 30,578,179 of ScoreUNet, and the two of NoiseSchedule_Scalar, its schedule's ends
    "vdm-cifar10": 30_578_181,
}


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_published_counts(name, count):
    preset = PRESETS[name]
    network = networks.build("network", name, preset.image, channels_out=preset.channels_out)
    assert tree.count(jax.eval_shape(network.init, jax.random.key(0))) + network.fixed == count


PUBLISHED_PAIRS = {
    # NVlabs/stylegan2-ada-pytorch, Generator and Discriminator: all that is trained, one strength a noise among it; no
    # fixed noise images, no running mean of w, no filters, which are buffers there
    "stylegan2-256": (24_767_458, 24_001_089),
    "stylegan2-1024": (30_370_060, 29_012_513),
    # brownvc/R3GAN: FFHQ-256 of Huang et al. 2024; the others of the same modules with the options of its train.py
    "r3gan-ffhq256": (23_057_952, 23_009_568),
    "r3gan-ffhq64": (22_429_824, 22_381_440),
    "r3gan-cifar10": (20_781_952, 21_280_512),
}


@pytest.mark.parametrize(("name", "counts"), PUBLISHED_PAIRS.items())
def test_published_counts_of_pairs(name, counts):
    image = PAIRS[name].image
    pair = gan.build_generator("g", name, image), gan.build_discriminator("d", name, image)
    (generator, *_), (discriminator, *_) = flops.shapes_of_pair(*pair, image)
    assert (tree.count(generator), tree.count(discriminator)) == counts
