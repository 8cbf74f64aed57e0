"""What share of captions is far from every centre when captions of an unknown kind arrive.

    python -m benchmarks.drift

Of the built-in captions, one family of characters is left out of a source of 16,000; what arrives has a share of it.
Embedder (lsa, 64 dimensions) and clusters (64 fine, 4 coarse) are the demo's. Captions alone, no image is drawn.
"""

from __future__ import annotations

import numpy as np

from mode.clustering.assignment import assign
from mode.clustering.drift import Counts, Drift, drift
from mode.clustering.hierarchy import fit_clusters
from mode.data.glyphs.dataset import caption
from mode.data.glyphs.families import FAMILIES
from mode.embedding.lsa import LsaEmbedder
from mode.params import ClusteringParams, GlyphParams

#: Families that are left out, one at a time.
ABSENT = ("chess", "cats", "hexagrams", "currency", "integrals", "white-arrows", "greek-small", "clubs")
SHARES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.5)
PAIRS, ARRIVING, FINE, COARSE = 16_000, 4_000, 64, 4


def captions(absent: str, share: float, count: int, random_seed: int) -> list[str]:
    """Captions of which so many are of one family, the others of all other families."""
    rng, params = np.random.default_rng(random_seed), GlyphParams(per_family=4)
    kinds = {character: family.kind for family in FAMILIES for character in family.first(4)}
    new = [character for family in FAMILIES if family.name == absent for character in family.first(4)]
    old = [character for character in kinds if character not in new]
    drawn = [rng.choice(new if rng.random() < share else old) for _ in range(count)]
    return [caption(character, kinds[character], ("red", "white"), params, rng) for character in drawn]


def drifts(absent: str) -> list[Drift]:
    """One for each share."""
    before = captions(absent, 0.0, PAIRS, 0)
    embedder = LsaEmbedder.fit(before, dimensions=64, random_seed=0)
    vectors = embedder.encode(before).astype(np.float16)
    clusters = fit_clusters(vectors, ClusteringParams(fine=FINE, coarse=COARSE), FINE, COARSE, 0)
    old = Counts.of([assign(vectors, clusters)], COARSE)
    found = []
    for number, share in enumerate(SHARES, start=1):
        arrived = embedder.encode(captions(absent, share, ARRIVING, number)).astype(np.float16)
        found.append(drift("new", Counts.of([assign(arrived, clusters)], COARSE), "base", old))
    return found


def main() -> None:
    """Print the share of far captions, family by share, and whether drift says that an expert pays."""
    print(f"{'family':<14}" + "".join(f"{share:>9.0%}" for share in SHARES))
    for absent in ABSENT:
        found = drifts(absent)
        print(f"{absent:<14}" + "".join(f"{each.far_share:>8.1%}{'*' if each.needs_expert else ' '}" for each in found))


if __name__ == "__main__":
    main()
