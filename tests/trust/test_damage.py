"""One flipped bit anywhere in what a project has written: `mode check` names it, and what is read is never wrong.

`--seed N` flips others.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mode.clustering.assignment import Assignment
from mode.clustering.hierarchy import Clusters
from mode.embedding.base import load_embedder
from mode.ensemble.router import Router
from mode.errors import ModeError
from mode.integrity import Finding, check_project
from mode.paths import Paths
from mode.results import Results
from tests.trust.tiny import files_below

pytestmark = pytest.mark.e2e  # real stages, again and again

#: Bits that are flipped in each output.
FLIPS = 12

#: Every kind of output, and what reading it gives, where reading claims to notice damage.
OUTPUTS: dict[str, Callable[[Path], object] | None] = {
    "data/index/base": None,
    "data/embedder": lambda path: load_embedder(path).fingerprint,
    "data/vectors/base.npy": None,
    "data/clusters/base": lambda path: _arrays(Clusters.load(path)),
    "data/assignment/base.parquet": lambda path: _arrays(Assignment.load(path)),
    "models/seed": None,
    "models/dense": None,
    "models/expert-0": None,
    "models/expert-1": None,
    "models/ensemble": lambda path: Router.load(path).weights([["white chess king"], ["ace of hearts"]]),
    "reports/metrics.json": lambda path: Results.load(path),
}


def _arrays(kept: object) -> object:
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(kept).items()}


def findings(project: Path) -> dict[str, Finding]:
    return {str(finding.path): finding for finding in check_project(Paths(project))}


def test_a_sound_project_is_found_sound_and_nothing_is_forgotten(finished: Path) -> None:
    found = findings(finished)
    assert found.keys() == OUTPUTS.keys()
    assert [finding for finding in found.values() if finding.fault or not finding.has_checksum] == []


@pytest.mark.parametrize("output", OUTPUTS)
def test_a_flipped_bit_is_named(project: Path, output: str, seed: int) -> None:
    read, path = OUTPUTS[output], project / output
    whole = read(path) if read else None
    files = [*files_below(path)]
    sizes = np.array([file.stat().st_size for file in files])
    random = np.random.default_rng([seed, sum(output.encode())])
    # Half of them in any byte, half in any file: small files say what large ones mean.
    chosen = [
        *random.choice(len(files), FLIPS // 2, p=sizes / sizes.sum()),
        *random.integers(0, len(files), FLIPS // 2),
    ]
    for number in chosen:
        file, bit = files[number], int(random.integers(0, 8 * sizes[number]))
        content = file.read_bytes()
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)

        faults = {name: finding.fault for name, finding in findings(project).items() if finding.fault}
        assert output in faults, f"bit {bit} of {file}"
        assert all("\n" not in fault for fault in faults.values())
        if read is not None:
            try:
                assert read(path) == whole, f"bit {bit} of {file}"
            except ModeError as error:
                assert "\n" not in str(error)  # noqa: PT017
        file.write_bytes(content)
    assert not any(finding.fault for finding in findings(project).values())
