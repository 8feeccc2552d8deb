"""Two players: losses, regularisers and augmentations of adversarial training. Knows no network."""
