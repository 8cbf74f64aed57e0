"""Other ways to use the same trained models: fewer experts, one merged model, other weights. Nothing is trained.

A variant has a row in the results as a model has; an arm (`mode.params.ARMS`) is one variant or several. All but merged
models are other sums of the same scores: every image is decoded once, and goes once through each model that any of them
needs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from mode.clip.device import pick_device
from mode.clip.encode import encode_prompts
from mode.clip.model import Clip
from mode.ensemble.combine import by_model, logit_scales
from mode.ensemble.router import STAND_IN, Router
from mode.evaluation.arms import BEST_BY_LABEL, Arms
from mode.evaluation.evaluate import ROUTER, looking, ready_models
from mode.evaluation.features import encode_metadata, encode_tasks
from mode.evaluation.mixtures import Routed, figures_of_all
from mode.evaluation.probes import PREFIX, probe
from mode.evaluation.scores import Collected, primary
from mode.evaluation.tasks import Task, open_tasks
from mode.params import MachineParams
from mode.progress import Progress
from mode.results import Cost, Results, cost_together
from mode.training.soup import Pairs


def evaluate_variants(
    models: Mapping[str, Path | Clip],
    router: Router,
    tasks: Sequence[Path] | Sequence[Task],
    machine: MachineParams,
    arms: Sequence[str],
    captions: Sequence[str] = (),
    random_seed: int = 0,
    costs: Mapping[str, Cost] | None = None,
    pairs: Pairs = (),
) -> Results:
    """Evaluate variants of an ensemble on task folders.

    With w the routing weights of a task's words, the arms are as follows. Where the ensemble weighs each query of a
    retrieval task by itself, so does a variant, among its own experts. Where it weighs by each image there are no
    words, and no arms but `by-range`, which weighs by each image as well, `best-by-label` and `probe`, for which an
    expert's weight in a task is the mean over its images.

    - `top-N`, `share-X`: the N experts of most weight; the fewest that make X of it; weights scaled to sum 1.
    - `merged`: one model, the experts' parameters averaged by w; `merged-N`: of the N of most weight; `merged-uniform`:
      of all alike, one model for all tasks; `merged-layers`: one for all tasks too, by weights that each layer learns
      on training pairs (`mode.training.soup`); `merged-seed-X`: (1 - X) of `merged` and X of the seed's parameters.
    - `published`, `paper`: w by another routing rule, with the numbers of `routing` in params.yaml.
    - `coarse`: an expert is known by the mean of its fine centres alone, which is its coarse centre (CoarseCluster of
      the paper's Table 6), and the routing is calibrated anew.
    - `by-class`: each class, or text, weighs the experts by itself.
    - `by-range`: only the experts whose clusters have the largest range (`mode.evaluation.arms.range_order`), and the
      seed in place of the others (the paper's Figure 7): `by-range-1`, `by-range-2` ... up to all of them.
    - `best-by-label`: for each task the one expert that does best on it. The test labels choose it: no rule that could
      be used, but what choosing well is worth.
    - `probe`: linear probes on the models' image features (`mode.evaluation.probes.probe`), several rows; their means
      are over the tasks that have enough images of each class.

    Args:
        models: name -> model folder, or a model that is loaded already; those that no arm needs are not opened.
        router, tasks, machine: as of `mode.evaluation.evaluate.evaluate_tasks`.
        arms: of `mode.params.ARMS`.
        captions, random_seed: as of `Router.fit`; for `coarse`.
        costs: model -> what its training took.
        pairs: training pairs for `merged-layers`; read once.

    Returns:
        Figures in 0..1 of every variant, how many image encoders it runs, and what all the trainings that it needs have
        cost. Provenance is the caller's to add.

    Raises:
        ModeError: as `evaluate_tasks` and `Arms`; `merged-layers` without pairs.
        ValueError: no such arm.
    """
    opened = [task for task in tasks if isinstance(task, Task)]
    opened = opened or open_tasks([task for task in tasks if isinstance(task, Path)])
    planned = Arms(arms, router, [*models], captions, random_seed, pairs)
    device, batch = str(pick_device(machine.device)), machine.inference_batch
    found, encoders = Collected([*planned.variants]), defaultdict[str, list[int]](list)
    probed = {row: len(sets[0]) for row, sets in planned.variants.items() if row.startswith(f"{PREFIX} ")}
    total = sum(len(task.images) for task in opened)
    needed = {name: models[name] for name in planned.models}
    looks = looking(router)
    with ready_models({**needed, **looks}, device) as ready, Progress("variants", total=total, unit="images") as bar:
        trained = {name: ready[name] for name in needed}
        clips, scales = trained | planned.merged(trained), logit_scales(trained)
        texts = encode_metadata(opened, clips, batch_size=batch, device=device)
        for number, task in enumerate(opened):
            merged = planned.merged(trained, task)
            seeing = clips | merged | {name: ready[name] for name in looks}
            encoded = encode_tasks(
                [task], seeing, batch_size=batch, workers=machine.decode_threads, device=device, silent=True
            )
            [(_, images)] = encoded
            looked = images.pop(ROUTER).cpu().numpy() if looks else None
            metadata = {name: parts[number] for name, parts in texts.items()}
            for name, clip in merged.items():
                metadata[name] = encode_prompts(clip, task.prompts, batch_size=batch, device=device, name=name)
            routed = Routed.by(planned.router, task, looked)
            mixtures = planned.mixtures(task, routed, scales)
            figures = figures_of_all(task, images, metadata, mixtures)
            if "probe" in arms and task.kind == "classification":
                weights = by_model(planned.members, routed.weights)
                figures |= probe(task, images, metadata, weights, clips)
            best = max(planned.experts, key=lambda name: primary(task, figures[name]))
            figures[BEST_BY_LABEL] = figures[best]
            own = {name: figures[name] for name in planned.variants if name in figures}
            found.add(task, own)
            several = probed | {name: mixture.encoders for name, mixture in mixtures.items()}
            for name in own:
                encoders[name].append(several.get(name, 1))
            bar.update(len(task.images))
    results = found.results(opened)
    results.encoders = {name: fmean(counts) for name, counts in encoders.items()}
    if costs is not None:
        results.cost = {name: _cost_of(costs, sets) for name, sets in planned.variants.items()}
    return results


def _cost_of(costs: Mapping[str, Cost], sets: Sequence[Sequence[str]]) -> Cost:
    """The mean over sets of models of what their trainings cost together, that of the seed counted once."""
    each = [_together(costs, models) for models in sets]
    if len(each) == 1:
        return each[0]
    parts = {kind: [getattr(cost, kind) for cost in each] for kind in Cost.model_fields}
    return Cost(**{kind: None if None in values else fmean(values) for kind, values in parts.items()})


def _together(costs: Mapping[str, Cost], models: Sequence[str]) -> Cost:
    if len(models) == 1:
        return costs.get(models[0], Cost())
    seed, *branched = (costs.get(name, Cost()) for name in dict.fromkeys([STAND_IN, *models]))
    return cost_together(seed, branched)
