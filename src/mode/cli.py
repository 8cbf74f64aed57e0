"""The `mode` command: the same functions that the pipeline's stages call, for one's own shards and tasks.

Heavy libraries are imported inside the commands, so that `mode --help` answers at once.
"""

from __future__ import annotations

import os
import platform
import sys
from collections import Counter
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from mode.errors import ModeError, in_one_line
from mode.processes import collect_rarely, spin_briefly, use_huge_pages

app = typer.Typer(
    name="mode",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Mixture of Data Experts for CLIP: cluster captions, train one CLIP per cluster, weigh them per task."
        "\n\nThe whole pipeline is `dvc repro`; its numbers are in params.yaml."
    ),
)


def _print_versions(wanted: bool) -> None:
    if wanted:
        for name in ("mode-clip", "torch", "open_clip_torch"):
            typer.echo(f"{name} {metadata.version(name)}")
        typer.echo(f"python {platform.python_version()}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Print the versions of mode, torch, open_clip and Python.",
            callback=_print_versions,
            is_eager=True,
        ),
    ] = False,
) -> None:
    pass


ParamsFile = Annotated[Path, typer.Option("--params", help="The parameter file.", show_default=True)]
PARAMS = Path("params.yaml")
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")]
ImageColumn = Annotated[str | None, typer.Option(help="A table's column of image paths, if not `image`.")]
CaptionColumn = Annotated[str | None, typer.Option(help="A table's column of captions, if not `caption`.")]
Models = Annotated[str, typer.Option(help="Folder of trained models, or `models:/mode-ensemble@champion`.")]
#: Images that `predict` classifies before its bar moves on.
_AT_ONCE = 256


@app.command("init")
def new_project(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new or empty folder; `.` is the current one.")],
    preset: Annotated[str, typer.Option(help="demo, finetune, paper-b16 or paper-b32.")] = "demo",
    shards: Annotated[
        str | None, typer.Option(help="Your pairs: a folder of tars, a glob, URLs, or a csv / tsv / parquet table.")
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FOLDER", help="A task to evaluate on, in CLIP_benchmark's webdataset layout; repeatable."
        ),
    ] = None,
    seed_model: Annotated[
        str | None,
        typer.Option(
            help="For finetune: ViT-B-16:laion2b_s34b_b88k, ViT-B-16:FILE, hf-hub:ORG/NAME or a model folder."
        ),
    ] = None,
    image_column: ImageColumn = None,
    caption_column: CaptionColumn = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Write beside other files, replacing none; with --upgrade: replace edited ones."),
    ] = False,
    upgrade: Annotated[
        bool, typer.Option("--upgrade", help="Bring a project to the installed version of mode.")
    ] = False,
) -> None:
    """Start a project of your own: params.yaml, dvc.yaml, flows, a git repository. Then: `dvc repro`.

    demo trains a tiny CLIP in minutes, on built-in data or on your shards.
    finetune branches experts from a pretrained CLIP: one GPU, ten thousand
    pairs or more. paper-b16 and paper-b32 have the paper's numbers: ViT-B/16
    and ViT-B/32 at 224 pixels, batches of 32,768, 1,024 fine clusters.
    On a terminal, it asks for what these still need:

    mode init chess --preset finetune --seed-model ViT-B-16:openai --shards pairs --tasks chess

    Shards and tasks stay where they are. Paths start from the current folder.
    A folder that holds more than .git and .venv is refused; nothing is replaced.

    After an upgrade of the package, stages stop until you call
    `mode init --upgrade FOLDER`. It rewrites dvc.yaml, prefect.yaml and
    flows, and adds new sections to params.yaml; `dvc status` then names the
    stages to run again.
    """
    from mode.stages.starting import next_steps, preset_called, start_project, upgrade_project

    columns = _columns(image_column, caption_column)
    if upgrade:
        if shards or tasks or seed_model or columns:
            raise ModeError("--upgrade leaves params.yaml as it is", "enter shards, tasks and seed there")
        for line in upgrade_project(folder, force).lines():
            typer.echo(line)
        return
    for need in preset_called(preset).needs if sys.stdin.isatty() else ():
        if need == "seed_model" and not seed_model:
            seed_model = typer.prompt("Pretrained CLIP (ViT-B-16:laion2b_s34b_b88k, hf-hub:ORG/NAME, a folder)")
        if need == "shards" and not shards:
            shards = typer.prompt("Shards (a folder of tars, a glob, URLs, a table)")
        if need == "tasks" and not tasks:
            tasks = typer.prompt("Task folders, separated by blanks").split()
    start_project(folder, preset, shards, tasks or (), seed_model, force, columns)
    for line in next_steps(folder, preset):
        typer.echo(line)


@app.command()
def stage(
    name: Annotated[str, typer.Argument(help="A stage of dvc.yaml, such as `index` or `expert`.")],
    key: Annotated[
        str | None, typer.Argument(help="Its source or expert, such as `base` or `expert-0`; in `dvc repro` DVC says.")
    ] = None,
    params: ParamsFile = PARAMS,
) -> None:
    """Run one stage of the pipeline, as dvc.yaml does. `dvc repro STAGE` runs it with all it needs."""
    from mode.processes import die_with_parent, ending_at_signals, leads
    from mode.roles import TRAINED

    die_with_parent()
    # Of `dvc repro`: `expert@expert-0`. In the command itself a name would be read by a shell.
    named = key or os.environ.get("DVC_STAGE", "").partition("@")[2] or None
    training = next((role.model(named if role.many else None) for role in TRAINED if role.name == name), None)
    said = f"{training}: stopped; the next run goes on from the last checkpoint, if there is one" if leads() else ""
    # Until it has begun, and when its last step is made: in between `mode.training.loop` leaves a checkpoint.
    with nullcontext() if training is None else ending_at_signals(said):
        from mode.stages import KEYED_STAGES, run_stage

        run_stage(name, named if name in KEYED_STAGES else key, Path.cwd(), params)


@app.command(
    "experiment", context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
)
def run_experiment(context: typer.Context) -> None:
    """Make the runs of experiments/NAME.yaml, side by side and resumable: `mode experiment NAME --plan` says what."""
    # Runs are DVC's, which the library does not know: the project's own flows drive it.
    if not Path("flows", "runs.py").is_file():
        advice = "run it in a project's folder; an older project gets it by `mode init --upgrade .`"
        raise ModeError(f"{Path.cwd()}: no flows/runs.py", advice)
    os.execv(sys.executable, [sys.executable, "-m", "flows.runs", *context.args])


@app.command("params")
def show_params(
    key: Annotated[str, typer.Argument(help="A section or one parameter, such as `training` or `training.lr`.")] = "",
    params: ParamsFile = PARAMS,
) -> None:
    """Check the parameter file and print every parameter with its value, defaults included, and what it does."""
    from mode.edit import explained
    from mode.params import load_params

    sys.stdout.write(explained(load_params(params), key))


@app.command("plan")
def plan_a_run(
    pairs: Annotated[str | None, typer.Option(help="Image-caption pairs, such as 400M or 2.5B.")] = None,
    model: Annotated[str | None, typer.Option(help="An architecture of open_clip, such as ViT-B-16.")] = None,
    experts: Annotated[int | None, typer.Option(min=1, help="Experts: coarse clusters.")] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="Plan a preset of `mode init`, not the project: paper-b16, paper-b32, finetune, demo."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Another value of params.yaml; repeatable."),
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="GPUs of each machine; on CPUs, trainings side by side.")
    ] = None,
    gpu: Annotated[str | None, typer.Option(help="a100, h100, h200 or cpu; others take --peak-tflops.")] = None,
    peak_tflops: Annotated[
        float | None, typer.Option(min=0.001, help="Peak of a GPU, in bfloat16 without sparsity.")
    ] = None,
    cores: Annotated[int | None, typer.Option(min=1, help="CPU cores of each machine; default 8 for each GPU.")] = None,
    memory: Annotated[
        float | None, typer.Option(min=0.001, help="Main memory of each machine in GB, to see what fits.")
    ] = None,
    gpu_memory: Annotated[
        float | None,
        typer.Option(min=0.001, help="Memory of each GPU in GB; default that of its kind, 80 for an A100."),
    ] = None,
    gpus_per_training: Annotated[
        int | None, typer.Option(min=1, help="GPUs for each training except the seed's; default all of a machine.")
    ] = None,
    gpus_of_seed: Annotated[
        int | None, typer.Option(min=1, help="GPUs for the seed; default all of all machines.")
    ] = None,
    evaluation_images: Annotated[int | None, typer.Option(min=1, help="Images of all tasks together.")] = None,
    price: Annotated[float | None, typer.Option(min=0.0, help="Price of a GPU hour; adds what stages cost.")] = None,
    rates: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Your own rates, YAML or JSON: docs/scaling.md explains them.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure this machine on the project's data first: a minute.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of a table.")] = False,
    params: ParamsFile = PARAMS,
) -> None:
    """Say what a run will need before it starts: disk, memory, hours, cost, and what each stage waits for.

    Without options it plans the project in the current folder, on this
    machine; options change its numbers. With --preset, or with --pairs where
    there is no project, the numbers are those of a preset, by default paper-b16:

    mode plan --gpu h100 --gpus 8 --nodes 4 --price 2.5

    mode plan --preset paper-b16 --pairs 2.5B --gpu a100 --memory 1000

    mode plan --set training.epoch_samples=100000000 --experts 8

    Rates say how fast a machine is: --measure measures this machine, also for
    later plans of this project; --rates gives your own; the others are those of
    docs/scaling.md. The output ends with each rate and its source. GPU hours,
    and so cost, are those that stages compute; the line below the table is the
    cost of all machines, idle ones included.
    """
    from mode.planning.table import print_plan
    from mode.stages.planning import Asked, measure_project, plan_project

    asked = Asked(
        preset=preset,
        pairs=pairs,
        model=model,
        experts=experts,
        settings=settings or (),
        nodes=nodes,
        gpus=gpus,
        gpu=gpu,
        peak_tflops=peak_tflops,
        cores=cores,
        memory_gb=memory,
        gpu_memory_gb=gpu_memory,
        gpus_per_training=gpus_per_training,
        gpus_of_seed=gpus_of_seed,
        evaluation_images=evaluation_images,
        price=price,
        rates=rates,
    )
    if measure:
        measure_project(Path.cwd(), params, asked)
    planned = plan_project(Path.cwd(), params, asked)
    if as_json:
        typer.echo(planned.model_dump_json(indent=2))
    else:
        print_plan(planned)


@app.command()
def verify(
    shards: Annotated[list[str], typer.Argument(help="Tars, folders, globs or tables of image-caption pairs.")],
    images: Annotated[bool, typer.Option(help="Decode every image.")] = True,
    details: Annotated[int, typer.Option("--list", help="Bad members to name, at most.")] = 20,
    image_column: ImageColumn = None,
    caption_column: CaptionColumn = None,
) -> None:
    """Read shards as the index does and account for what is bad; exit code 1 if anything is."""
    from mode.data.shards.index import verify as verify_shards
    from mode.reporting.tables import print_index_report

    report = verify_shards(shards, Path.cwd(), images, details, _columns(image_column, caption_column))
    print_index_report(report, details)
    if report.bad:
        raise typer.Exit(1)


@app.command()
def check(params: ParamsFile = PARAMS) -> None:
    """Compare everything that the project's stages have written with its checksums; exit code 1 if anything is damaged.

    All of it is read: indexes, vectors, embedder, clusters, assignments, models, checkpoints, metrics.
    """
    from mode.integrity import check_project
    from mode.params import load_params
    from mode.paths import Paths

    damaged, total = 0, 0
    known = load_params(params) if params.is_file() else None
    roots = {source: known.root_of(source) for source in known.sources} if known else {}
    for finding in check_project(Paths(Path.cwd()), roots):
        state = "DAMAGED" if finding.fault else "ok" if finding.has_checksum else "no checksum"
        typer.echo(f"{finding.number} of {finding.total}: {state}: {finding.fault or finding.path}")
        damaged, total = damaged + bool(finding.fault), finding.total
    typer.echo(f"{total} outputs, {damaged or 'none'} damaged")
    if damaged:
        raise typer.Exit(1)


@app.command()
def evaluate(
    tasks: Annotated[
        list[str] | None,
        typer.Option("--tasks", metavar="FOLDER...", help="Task folders in CLIP_benchmark's webdataset layout."),
    ] = None,
    more: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,  # the folders after the first
    suite: Annotated[str | None, typer.Option(help="In place of --tasks: clip26, robustness or retrieval.")] = None,
    root: Annotated[Path, typer.Option(help="Where the suite's task folders lie.")] = Path(),
    models: Annotated[Path, typer.Option(help="The folder of trained models.")] = Path("models"),
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="One model alone: a model folder, or the checkpoint of a training that is not finished."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the figures there, as JSON.")] = None,
    device: Device = "auto",
    params: ParamsFile = PARAMS,
) -> None:
    """Evaluate every trained model, the uniform average and the routed ensemble on any task folders.

    A suite's tasks are looked for under --root by their usual names; those that are not there are listed. With
    --checkpoint the tasks are the project's, if no others are given.
    """
    from mode.reporting.tables import print_results
    from mode.stages.evaluation import evaluate_checkpoint, evaluate_folders, evaluate_suite

    folders = [*(tasks or []), *(more or [])]
    if checkpoint and suite:
        raise ModeError("evaluate --checkpoint takes --tasks, and no --suite", "mode evaluate --checkpoint FOLDER")
    if bool(folders) == bool(suite) and not checkpoint:
        raise ModeError("evaluate needs either --tasks or --suite", "mode evaluate --suite clip26 --root DIR")
    if checkpoint:
        found = evaluate_checkpoint(checkpoint, folders, params, device)
    elif suite:
        found = evaluate_suite(suite, root, models, params, device)
    else:
        found = evaluate_folders(folders, models, params, device)
    print_results(found)
    if found.suite and found.suite.missing:
        typer.echo(f"not there ({len(found.suite.missing)}): {', '.join(found.suite.missing)}")
    if output:
        found.save(output)
        typer.echo(f"wrote {output}")


@app.command("leakage")
def look_for_leakage(
    distance: Annotated[int, typer.Option(min=0, max=64, help="Bits of 64 that the hashes may differ in.")] = 4,
    params: ParamsFile = PARAMS,
) -> None:
    """Look for test images among the training images: leakage.json lists them; exit code 1 if there are any.

    Compares every training image of the index with every image of the project's tasks. With `index.drop_leaked: true`
    the next `dvc repro` leaves them out of the training.
    """
    from mode.reporting.tables import print_leakage
    from mode.stages.evaluation import look_for_leakage

    found = look_for_leakage(Path.cwd(), params, distance)
    print_leakage(found)
    if found.leaks:
        raise typer.Exit(1)


@app.command()
def compare(
    run_a: Annotated[str, typer.Argument(help="A run's id or name in MLflow, such as `dense`.")],
    run_b: Annotated[str, typer.Argument(help="The other run.")],
    runs: Annotated[Path, typer.Option(help="The folder of MLflow's database.")] = Path("mlruns"),
) -> None:
    """Compare two MLflow runs: the parameters that differ, and the metrics side by side."""
    from mode.reporting.tables import print_comparison
    from mode.tracking.runs import Tracker

    print_comparison(Tracker(runs).compare(run_a, run_b))


@app.command()
def results(
    metrics: Annotated[Path, typer.Argument(help="A metrics file.")] = Path("reports/metrics.json"),
    variants: Annotated[
        bool, typer.Option("--variants", help="Other ways to use the same models, from variants.json beside it.")
    ] = False,
) -> None:
    """Print the table of the last evaluation."""
    from mode.reporting.tables import print_results, print_variants
    from mode.results import Results

    if variants:
        print_variants(Results.load(metrics.with_name("variants.json")), Results.load(metrics))
    else:
        print_results(Results.load(metrics))


@app.command("book")
def write_the_book() -> None:
    """Write docs/paper.md, its figures and reports/paper.html: all experiments with intervals, from their results."""
    from mode.experiments.book import write_book
    from mode.paths import Paths

    for path in write_book(Paths(Path.cwd())):
        typer.echo(f"wrote {path.relative_to(Path.cwd().resolve())}")


@app.command()
def order(
    task: Annotated[str, typer.Argument(help="A task of the project, or a task folder.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the order there, as JSON.")] = None,
    params: ParamsFile = PARAMS,
) -> None:
    """Order the experts by how much they matter for a task, from its words alone: train them in that order.

    The experts need not be trained yet; `dvc repro ensemble` has to have run.
    """
    from mode.stages.evaluation import order_experts
    from mode.stages.project import write_json

    weights = order_experts(Path.cwd(), params, task)
    for expert, weight in weights.items():
        typer.echo(f"{expert}\t{weight:.3f}")
    if output:
        write_json(output, weights)


@app.command()
def targets(
    tasks: Annotated[list[str], typer.Argument(metavar="TASK...", help="Tasks of the project, or task folders.")],
    params: ParamsFile = PARAMS,
) -> None:
    """Print the class names of tasks as `targets`, to be copied into `clustering` of params.yaml.

    With `strategy: targets` one expert is trained on the fine clusters nearest to them. The pipeline itself never
    looks at a task to make clusters.
    """
    import yaml

    from mode.stages.evaluation import class_names

    names = class_names(Path.cwd(), params, tasks)
    typer.echo(yaml.safe_dump({"targets": names}, allow_unicode=True, width=120, default_flow_style=None), nl=False)


@app.command("export-shards")
def export_expert(
    expert: Annotated[str, typer.Argument(help="The expert, such as `expert-0`.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write the tars.")],
    pairs_per_shard: Annotated[int, typer.Option(min=1, help="Pairs in one tar.")] = 10_000,
    force: Annotated[
        bool, typer.Option("--force", help="Replace another export in a folder that is not empty.")
    ] = False,
    params: ParamsFile = PARAMS,
) -> None:
    """Write the pairs that an expert is trained on as webdataset tars, for any other trainer.

    Interrupted, it goes on when it is called again.
    """
    from mode.stages.shipping import export_shards

    export_shards(Path.cwd(), params, expert, folder, pairs_per_shard, force)


@app.command("pack")
def pack_training(
    name: Annotated[str, typer.Argument(help="A model that is trained, such as `expert-2` or `dense`.")],
    where: Annotated[
        str, typer.Argument(metavar="DIR", help="Folder or URL to write to, such as s3://bucket/expert-2.")
    ],
    images_per_shard: Annotated[int, typer.Option(min=1, help="Images in one tar.")] = 10_000,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there: another pack, or this one.")] = False,
    params: ParamsFile = PARAMS,
) -> None:
    """Write the images that a training uses into shards of its own, so that it reads nothing else.

    An expert's pairs lie scattered over all shards. From object storage a
    training that reads in long ranges then fetches much that it does not want;
    from its pack it fetches its share alone. Its index has to be there, and for
    an expert the assignment: `dvc repro assign`.

    mode pack expert-2 s3://bucket/expert-2

    Then, in params.yaml: `machine: {packs: {expert-2: s3://bucket/expert-2}}`.
    What is trained is the same, bit by bit. Other trainers read the tars, too:
    an image once, with its captions (txt: the first; json, `texts`: all).

    Interrupted, it goes on when it is called again.
    """
    from mode.stages.shipping import pack_images

    pack_images(Path.cwd(), params, name, where, images_per_shard, force)


@app.command("export-model")
def export_one_model(
    name: Annotated[str, typer.Argument(help="A trained model, such as `expert-0`; `merged`: the experts' mean.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write it.")],
    models: Annotated[Path, typer.Option(help="The folder of trained models.")] = Path("models"),
) -> None:
    """Write a model as an ordinary open_clip folder; an adapter is folded into the weights of its seed.

    `merged` is one model with the mean of all experts' parameters, to go on from by `seed: {from: pretrained}`.
    """
    from mode.clip.export import export_model
    from mode.ensemble.export import MERGED, export_merged

    if name == MERGED and not (models / name).exists():
        export_merged(models, folder)
    else:
        export_model(models, name, folder)
    typer.echo(f"{name}: open_clip.create_model_and_transforms('local-dir:{folder}') opens it")


@app.command()
def predict(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files, and folders of them.")],
    classes: Annotated[str | None, typer.Option(help="Class names, separated by commas.")] = None,
    classes_file: Annotated[
        Path | None, typer.Option(help="In place of --classes: a file with a class name in each line.")
    ] = None,
    template: Annotated[
        list[str] | None, typer.Option(help="A prompt with {c} for the class name; may be given several times.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Only the experts of the largest weights.")] = None,
    models: Models = "models",
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in place of a table.")] = False,
) -> None:
    """Classify images among classes of your own with the ensemble."""
    import json

    import mode
    from mode.progress import Progress
    from mode.reporting.tables import print_predictions

    names, paths = _class_names(classes, classes_file), [str(image) for image in _image_files(images)]
    task = mode.load(models, device=None if device == "auto" else device).adapt(names, template, top_k=top_k)
    probabilities: list[list[float]] = []
    with Progress("predict", total=len(paths), unit="images") if len(paths) > _AT_ONCE else nullcontext() as bar:
        for first in range(0, len(paths), _AT_ONCE):
            probabilities += task(paths[first : first + _AT_ONCE]).tolist()
            if bar is not None:
                bar.update(len(probabilities) - first)
    if as_json:
        rows = [
            {"image": image, "label": names[row.index(max(row))], "probabilities": dict(zip(names, row, strict=True))}
            for image, row in zip(paths, probabilities, strict=True)
        ]
        typer.echo(json.dumps({"weights": task.weights, "predictions": rows}, indent=2))
    else:
        print_predictions(paths, names, probabilities, task.weights)


@app.command("app")
def web_page(
    models: Models = "models",
    device: Device = "auto",
    port: Annotated[int, typer.Option(help="On this machine only (127.0.0.1); 0: any free one.")] = 7860,
) -> None:
    """Open a web page to try the ensemble: drop an image, type classes, see what each expert says and its weight."""
    import mode
    from mode.app import serve

    serve(mode.load(models, device=None if device == "auto" else device), port)


@app.command("serve")
def answer_over_http(
    model: Annotated[str, typer.Option(help="A registered ensemble.")] = "models:/mode-ensemble@champion",
    port: Annotated[int, typer.Option(help="On this machine only (127.0.0.1); 0: any free one.")] = 5001,
    runs: Annotated[Path, typer.Option(help="The folder of MLflow's database.")] = Path("mlruns"),
) -> None:
    """Answer requests to the registered ensemble over HTTP, in the format of `mlflow models serve`."""
    from mode.door import serve
    from mode.ensemble.request import MAX_REQUEST
    from mode.tracking.serving import scoring_app

    def announce(address: str) -> None:
        typer.echo(f"POST {address}/invocations    (Ctrl-C stops it)")

    serve(scoring_app(model, runs), port, announce, MAX_REQUEST)


@app.command("get-model")
def get_model(
    name: Annotated[str, typer.Argument(help="hf-hub:ORG/NAME, a folder, or an architecture such as ViT-B-16.")],
    folder: Annotated[Path, typer.Argument(help="Where the model goes; must not be there yet.")],
    weights: Annotated[str | None, typer.Option(help="For an architecture: a tag of open_clip, or a file.")] = None,
) -> None:
    """Fetch a pretrained CLIP, check it, and write it as a folder: for a seed where there is no network.

    Then, in params.yaml: `seed: {from: pretrained, name: local-dir:FOLDER}`.
    """
    from mode.clip.model import save_sealed
    from mode.clip.pretrained import given_card, open_seed
    from mode.params import parse_seed

    if folder.exists():
        raise ModeError(f"{folder}: is there already", "give another folder")
    seed = parse_seed({"from": "pretrained", "name": name, "weights": weights}, name)
    clip, origin = open_seed(seed, Path.cwd())
    save_sealed(folder, clip, given_card(clip, origin))
    licence = f"licence {origin.licence}" if origin.licence else "its source states no licence"
    typer.echo(f"{folder}: {origin.name}, {origin.weights}, SHA-256 {origin.sha256}, {licence}")


@app.command("add-source")
def new_source(
    name: Annotated[str, typer.Argument(help="A name for the new source, such as `medical`.")],
    shards: Annotated[str, typer.Argument(help="A folder of tars, a glob, or a csv / tsv / parquet table.")],
    experts: Annotated[int, typer.Option(min=1, help="New experts: coarse clusters of the source.")] = 1,
    fine: Annotated[int | None, typer.Option(min=1, help="Fine clusters of the source.")] = None,
    image_column: ImageColumn = None,
    caption_column: CaptionColumn = None,
    params: ParamsFile = PARAMS,
) -> None:
    """Add shards as a source of their own, with experts that branch from the same seed. Then: `dvc repro`.

    Nothing old is touched: no file of another source, no trained model.
    """
    from mode.stages.sources import add_source

    columns = _columns(image_column, caption_column)
    added = add_source(Path.cwd(), params, name, shards, experts, fine, columns)
    typer.echo(f"added source '{name}' with {', '.join(added)}; `dvc repro` trains {'it' if experts == 1 else 'them'}")


@app.command("arrivals")
def look_for_arrivals(
    source: Annotated[str, typer.Argument(help="The source that shards may have come to, such as `base`.")],
    look: Annotated[bool, typer.Option("--look", help="Say what has come, and change nothing.")] = False,
    params: ParamsFile = PARAMS,
) -> None:
    """Make shards that have come to a source one of their own, which continues it. Then: `dvc repro`.

    They are indexed, embedded, and assigned to the existing clusters. What was
    made from the earlier shards stays as it is, and so do all models;
    `mode update-expert` trains one further. Until you run `mode arrivals`,
    `dvc repro` and flows stop, since they would make everything again that is
    made from the source.
    """
    from mode.stages.sources import find_arrival

    found = find_arrival(Path.cwd(), params, source, enter=not look)
    said = f"{found.shards:,} new shard{'s' if found.shards != 1 else ''} of '{source}', {found.bytes / 1e6:,.1f} MB"
    entered = f"now the source '{found.name}', which `dvc repro` indexes, embeds and assigns"
    typer.echo(f"{said}; `mode arrivals {source}` makes them '{found.name}'" if look else f"{said}: {entered}")


@app.command("drift")
def look_for_drift(params: ParamsFile = PARAMS) -> None:
    """Say how what has arrived differs from what it continues, and whether it is worth an expert of its own."""
    from mode.params import load_params
    from mode.reporting.tables import print_drift
    from mode.stages.project import Project
    from mode.stages.reports import drifts

    found = drifts(Project(Path.cwd(), load_params(params)))
    if not found:
        raise ModeError("nothing that has arrived is assigned yet", "`mode arrivals SOURCE`, then `dvc repro`")
    print_drift(found)


@app.command("update-expert")
def train_on(
    name: Annotated[str, typer.Argument(help="The expert, such as `expert-2`.")],
    params: ParamsFile = PARAMS,
) -> None:
    """Train an expert further, on pairs of its cluster that have arrived since. Then: `dvc repro`.

    The new model takes the expert's place in the ensemble; the old one stays
    as it is, and so do all others. There is one training for each arrival that
    the expert has not seen, and each goes on from the one before. An expert
    that is an adapter stays one: its own matrices are trained further, with the
    same rank in the same layers of the same seed.
    """
    from mode.stages.sources import add_updates

    added = add_updates(Path.cwd(), params, name)
    typer.echo(f"added {', '.join(added)}; `dvc repro` trains {'it' if len(added) == 1 else 'them'}")


@app.command("remove-expert")
def drop_expert(
    name: Annotated[str, typer.Argument(help="The expert, such as `expert-4`.")],
    params: ParamsFile = PARAMS,
) -> None:
    """Take an expert, or an update of one, out of the ensemble. Then: `dvc repro`. DVC's cache keeps its model."""
    from mode.stages.sources import remove_expert

    remove_expert(Path.cwd(), params, name)
    typer.echo(f"removed '{name}'; `dvc repro` evaluates the ensemble without it")


def _class_names(listed: str | None, file: Path | None) -> list[str]:
    """Classes as an option lists them, or a file does."""
    if (listed is None) == (file is None):
        raise ModeError("predict: classes come from --classes or from --classes-file", "give one of the two")
    option, names = "--classes", (listed or "").split(",")
    if file is not None:
        option = "--classes-file"
        try:
            names = [line for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise ModeError(f"{file}: cannot be read: {in_one_line(error)}", "a class name in each line") from None
    names = [name.strip() for name in names]
    if twice := next((name for name, count in Counter(names).items() if name and count > 1), None):
        raise ModeError(f"{option}: '{twice}' is named twice", "an image cannot be told apart between the two")
    return names


def _image_files(paths: list[Path]) -> list[Path]:
    """Files as they are given, and the images of folders, sorted by name."""
    from mode.data.shards.scan import IMAGE_SUFFIXES

    files: list[Path] = []
    for path in paths:
        found = (
            sorted(each for each in path.iterdir() if each.suffix.lower() in IMAGE_SUFFIXES)
            if path.is_dir()
            else [path]
        )
        if not found:
            raise ModeError(f"{path}: no images in this folder", f"files that end in {', '.join(IMAGE_SUFFIXES)}")
        files += found
    return files


def _columns(image: str | None, caption: str | None) -> dict[str, str]:
    """Names of a table's columns, as far as they are given, under their keys in params.yaml."""
    given = {"image_column": image, "caption_column": caption}
    return {key: column for key, column in given.items() if column is not None}


def main(arguments: list[str] | None = None) -> None:
    """Run the command; a fault that the user can mend is one line on standard error and exit code 1."""
    use_huge_pages()
    spin_briefly()
    collect_rarely()
    try:
        app(arguments, standalone_mode=True)
    except BrokenPipeError:  # `mode results | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ModeError, OSError) as error:
        typer.secho(f"error: {_describe(error)}", fg=typer.colors.RED, err=True)  # no colour where there is no terminal
        sys.exit(error.exit_code if isinstance(error, ModeError) else ModeError.exit_code)


def _describe(error: ModeError | OSError) -> str:
    if isinstance(error, ModeError):
        return str(error)
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{error.strerror or error}"


if __name__ == "__main__":
    main()
