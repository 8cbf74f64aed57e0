from pathlib import Path

import pytest
import yaml

from mode.errors import ModeError
from mode.params import Params, explanations, load_params, parse_params

MINIMAL = {
    "sources": {"base": {"shards": "glyphs"}},
    "experts": {"expert-0": {"cluster": 0}},
    "model": {"name": "ViT-B-32"},
}


#: Embedding with this project's seed.
SEEING = {"kind": "seed", "made_from": "models/seed"}


def changed(**sections: object) -> dict[str, object]:
    return {**MINIMAL, **sections}


def test_defaults_complete_a_minimal_file() -> None:
    params = parse_params(MINIMAL)
    assert params.clustering.fine == 64
    assert params.experts["expert-0"].source == "base"
    assert params.clusters_of("base") == (64, 4)


def test_the_projects_own_file_is_valid() -> None:
    assert isinstance(load_params(Path(__file__).parent.parent / "params.yaml"), Params)


def test_a_source_may_have_its_own_numbers_of_clusters() -> None:
    params = parse_params(changed(sources={"base": {"shards": "x"}, "new": {"shards": "y", "fine": 8, "coarse": 2}}))
    assert params.clusters_of("new") == (8, 2)
    assert params.clusters_of("base") == (64, 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(clusterin={}), "clusterin: unknown parameter"),
        (changed(training={"epoks": 3}), "training.epoks: unknown parameter"),
        (changed(training={"epochs": "32"}), "training.epochs: Input should be a valid integer, not '32'"),
        (changed(training={"epochs": True}), "training.epochs: Input should be a valid integer, not True"),
        (changed(training={"epochs": 5, "seed_epochs": 5}), "seed_epochs (5) must be smaller than epochs (5)"),
        (changed(training={"batch_size": 10, "accumulate": 3}), "batch_size (10) is not a multiple of accumulate (3)"),
        (changed(training={"betas": [0.9]}), "training.betas.1: missing"),
        (changed(training={"held_out": -1}), "training.held_out: Input should be greater than or equal to 0"),
        (
            changed(training={"validate": {"tasks": ["a"]}}),
            "training.validate: every: needed with `tasks` or `held_out`",
        ),
        (changed(training={"validate": {"every": 5}}), "training.validate: every: needs `tasks` or `held_out`"),
        (
            changed(training={"validate": {"every": 0, "tasks": ["a"]}}),
            "validate.every: Input should be greater than 0",
        ),
        (
            changed(training={"validate": {"every": 5, "held_out": 9}}),
            "validate.held_out: 9 images, but training.held_out",
        ),
        (changed(training={"keep_checkpoints": {"last": 0}}), "keep_checkpoints.last: Input should be greater than 0"),
        (changed(training={"keep_checkpoints": 5}), "training.keep_checkpoints: Input should be a valid dictionary"),
        (changed(routing={"retrieval": "query", "kind": "paper"}), "retrieval 'query' needs kind 'calibrated'"),
        (changed(clustering={"fine": 4, "coarse": 8}), "coarse (8) exceeds fine (4)"),
        (changed(sources={"base": {"shards": "x", "fine": 2}}), "sources.base: coarse (4) exceeds fine (2)"),
        (changed(experts={"expert-0": {"cluster": 4}}), "experts.expert-0.cluster: 4, but source 'base' has 4"),
        (changed(experts={"a": {"cluster": 0}, "b": {"cluster": 0}}), "'a' already has cluster 0"),
        (changed(experts={"dense": {"cluster": 0}}), "experts.dense: that name belongs to another model"),
        (changed(experts={"a": {"cluster": 0, "source": "no"}}), "experts.a.source: no source is called 'no'"),
        (changed(embedding={"kind": "transformers"}), "needs `name`"),
        (changed(embedding={"made_from": "data/index/other"}), "embedding.made_from: no source is called 'other'"),
        (changed(embedding={"made_from": "models/seed"}), "lsa is fitted on captions"),
        (changed(embedding={"kind": "open_clip", "name": "models/seed"}), "`made_from: models/seed` says so to DVC"),
        (changed(embedding={"fit_on": "base"}), "embedding.fit_on: is now embedding.made_from"),
        (changed(clustering={"strategy": "targets", "coarse": 2}), "`strategy: targets` and `targets` go together"),
        (changed(clustering={"targets": ["dog"]}), "`strategy: targets` and `targets` go together"),
        (
            changed(clustering={"strategy": "targets", "targets": ["dog"]}),
            "clustering: source 'base' has 4 coarse clusters, but strategy 'targets' makes two",
        ),
        (
            changed(clustering={"strategy": "targets", "targets": ["dog", " "], "coarse": 2}),
            "clustering.targets.1: String should match pattern",
        ),
        (
            changed(
                clustering={"strategy": "targets", "targets": ["dog"], "coarse": 2},
                embedding={**SEEING, "view": "image"},
                experts={"expert-0": {"cluster": 0}},
            ),
            "clustering.targets are words, which no image is compared with",
        ),
        (changed(embedding={"view": "image"}), "view 'image' needs kind 'seed': `lsa` embeds captions alone"),
        (changed(embedding={"kind": "open_clip", "name": "a:b", "view": "both"}), "view 'both' needs kind 'seed'"),
        (
            changed(embedding={**SEEING, "view": "image"}, routing={"kind": "paper"}),
            "'image' weighs the experts by each image: it needs routing.kind 'calibrated' and",
        ),
        (changed(embedding={**SEEING, "view": "image"}, routing={"kind": "evidence"}), "not 'evidence' and 'query'"),
        (changed(embedding={**SEEING, "view": "image"}, routing={"retrieval": "together"}), "and 'together'"),
        (changed(embedding={**SEEING, "view": "image"}, routing={"retrieval": "paper"}), "'calibrated' and 'paper'"),
        (changed(embedding={"view": "sound"}), "embedding.view: Input should be 'text', 'image' or 'both'"),
        (changed(training={"threads": 1}), "training.threads: is now machine.threads"),
        (
            changed(training={"batch_siz": 1}),
            "training.batch_siz: unknown parameter (did you mean training.batch",
        ),
        (
            changed(training={"learning_rate": 1}),
            "training.learning_rate: unknown parameter (did you mean training.lr?)",
        ),
        (changed(training={"grad_checkpointing": True}), "(did you mean machine.grad_checkpointing?)"),
        (changed(training={"qqq": True}), "training.qqq: unknown parameter (`mode params training` lists all)"),
        (changed(trainig={}), "trainig: unknown parameter (did you mean training?)"),
        (changed(experts={"e": {"cluster": 0, "epoch": 3}}), "(did you mean experts.e.epochs?)"),
        (
            changed(evaluation={"tasks": "/data/pets"}),
            "tasks: '/data/pets', but it is `glyphs` or a list of folders: [/data",
        ),
        (changed(training={"lr": "1e-4x"}), "training.lr: Input should be a valid number, not '1e-4x'"),
        (changed(training={"epochs": "1e2"}), "training.epochs: Input should be a valid integer, not '1e2'"),
        (changed(training={"epochs": 0}), "greater than 0, not 0 (Length of the dense model, in epochs.)"),
        (changed(model={}), "give either `name` or `config`"),
        (changed(image={"crop_ratio": [2, 1]}), "image: crop_ratio: 2 to 1, but it goes from a number above 0"),
        (changed(image={"crop_ratio": [0, 1]}), "image: crop_ratio: 0 to 1, but it goes from a number above 0"),
        (changed(image={"color_jitter": [0.4, 0.4, 0.4, 0.1]}), "give both or none"),
        (changed(image={"color_jitter_prob": 0.5}), "give both or none"),
        (changed(image={"color_jitter": [0.4, 0.4, 0.4, 0.6], "color_jitter_prob": 0.5}), "hue at most 0.5"),
        (changed(image={"color_jitter": [0.4, 0.4], "color_jitter_prob": 0.5}), "image.color_jitter.2: missing"),
        (changed(image={"color_jitter": [0.4, 0.4, -1, 0], "color_jitter_prob": 0.5}), "each from 0 to 10"),
        (
            changed(image={"color_jitter": [0.4, 0.4, float("nan"), 0], "color_jitter_prob": 1}),
            "image.color_jitter.2: Input should be a finite number, not nan",
        ),
        (changed(image={"crop_ratio": [0.5, float("inf")]}), "image.crop_ratio.1: Input should be a finite number"),
        (changed(image={"std": [0.0, 1.0, 1.0]}), "image.std.0: Input should be greater than 0, not 0.0"),
        (changed(training={"lr": float("inf")}), "training.lr: Input should be a finite number, not inf"),
        (changed(training={"betas": [1.0, 0.98]}), "training.betas.0: Input should be less than 1, not 1.0"),
        (changed(training={"betas": [0.9, float("nan")]}), "training.betas.1: Input should be a finite number"),
        (changed(image={"gray_scale_prob": 2}), "image.gray_scale_prob: Input should be less than or equal to 1"),
        (changed(sources={"base": {"shards": {}}}), "at least one; not `glyphs`"),
        (changed(sources={"base": {"shards": {"x": 1, "glyphs": 2}}}), "at least one; not `glyphs`"),
        (changed(sources={"base": {"shards": {"x": 0}}}), "Input should be greater than 0, not 0"),
        (changed(sources={"base": {"shards": {"x": 1001}}}), "Input should be less than or equal to 1000, not 1001"),
        (changed(sources={}), "sources: at least one is needed"),
        (changed(sources={"base": {"shards": "x", "filters": ["a > b"]}}), "'a > b' is no filter"),
        (
            changed(sources={"base": {"shards": "x", "captions": {"txt": 0.5}}}),
            "the probabilities add up to 0.5, not 1",
        ),
        (changed(sources={"base": {"shards": "x", "captions": {}}}), "captions: the probabilities add up to 0, not 1"),
        (changed(sources={"base": {"shards": "x", "captions": {"txt": 0}}}), "captions.txt: Input should be greater"),
        (changed(sources={"base": {"shards": "x", "filters": [3]}}), "sources.base.filters.0: Input should be a valid"),
        ({}, "sources: missing"),
        (None, "params.yaml: sections are wanted, such as `sources:` and `training:`; it is empty"),
        ("sources", "`training:`; not 'sources' (`mode init FOLDER` writes a whole one)"),
    ],
)
def test_a_fault_is_named_with_its_key(content: object, message: str) -> None:
    with pytest.raises(ModeError) as caught:
        parse_params(content)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModeError, match=r"params.yaml: no such file"):
        load_params(tmp_path / "params.yaml")
    for content in (b"a: [", b"a: caf\xe9", b"a: 2026-13-01", b"[" * 3000):
        (tmp_path / "params.yaml").write_bytes(content)
        with pytest.raises(ModeError, match=r"params.yaml: not valid YAML"):
            load_params(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("a: [")
    with pytest.raises(ModeError, match=r"params.yaml: not valid YAML: line 1, column 5: .* but found"):
        load_params(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("training:\n  lr: 0.1\n  epochs: 3\n  lr: 0.2\n")
    with pytest.raises(ModeError, match=r"params.yaml: not valid YAML: line 4, column 3: 'lr' is given twice$"):
        load_params(tmp_path / "params.yaml")


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "1E-4", "0.0001", "1.e-4"])
def test_a_rate_may_be_written_as_everybody_does(tmp_path: Path, text: str) -> None:
    """PyYAML takes numbers such as 1e-4 for texts; DVC does not."""
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(MINIMAL) + f"training: {{lr: {text}, clip_norm: {text}}}\n")
    training = load_params(tmp_path / "params.yaml").training
    assert (training.lr, training.clip_norm) == (0.0001, 0.0001)


def test_params_survive_a_round_trip_through_yaml(tmp_path: Path) -> None:
    params = parse_params(MINIMAL)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params.model_dump(mode="json")))
    assert load_params(tmp_path / "params.yaml") == params


def test_every_key_is_explained() -> None:
    explained = dict(explanations())
    assert {"training.lr", "sources.*.shards", "experts.*.cluster", "machine.device", "image.mean"} <= explained.keys()
    assert [key for key, text in explained.items() if not text] == []


def test_the_environment_overrides_machine_and_nothing_else() -> None:
    environment = {"MODE_DEVICE": "cuda:1", "MODE_THREADS": "3", "MODE_CHECKPOINT_MINUTES": "0.5", "MODE_LR": "1.0"}
    params = parse_params(changed(machine={"threads": 1, "workers": 4}), environment=environment)
    machine = params.machine
    assert (machine.device, machine.threads, machine.workers, machine.checkpoint_minutes) == ("cuda:1", 3, 4, 0.5)
    assert params.training.lr == parse_params(MINIMAL).training.lr
    assert parse_params(MINIMAL, environment={"MODE_DEVICE": ""}).machine.device == "auto"


@pytest.mark.parametrize(("variable", "meant"), [("MODE_PROCESES", "MODE_PROCESSES"), ("MODE_WORKER", "MODE_WORKERS")])
def test_a_variable_that_is_nearly_a_setting_is_refused(variable: str, meant: str) -> None:
    with pytest.raises(ModeError, match=f"environment: {variable}: unknown setting") as caught:
        parse_params(MINIMAL, environment={variable: "8"})
    assert f"did you mean {meant}?" in str(caught.value)


@pytest.mark.parametrize("variable", ["MODE_MLFLOW_URL", "MODE_LOCKS", "MODE_STARTED_BY", "MODE_OF_ANOTHER_PROGRAM"])
def test_other_variables_are_none_of_its_business(variable: str) -> None:
    parse_params(MINIMAL, environment={variable: "8"})


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("MODE_THREADS", "0", "environment: MODE_THREADS: Input should be greater than 0, not 0"),
        ("MODE_THREADS", "two", "environment: MODE_THREADS: Input should be a valid integer, not 'two'"),
        ("MODE_DEVICE", "[", "environment: MODE_DEVICE: not valid YAML"),
        ("MODE_DEVICE", "2026-13-01", "environment: MODE_DEVICE: not valid YAML"),
        ("MODE_STOP_SECONDS", ".inf", "environment: MODE_STOP_SECONDS: Input should be a finite number, not inf"),
    ],
)
def test_a_fault_in_the_environment_names_the_variable(variable: str, value: str, message: str) -> None:
    with pytest.raises(ModeError) as caught:
        parse_params(MINIMAL, environment={variable: value})
    assert message in str(caught.value)


def test_a_machine_that_is_no_section_is_named_whatever_the_environment_says() -> None:
    with pytest.raises(ModeError, match=r"params.yaml: machine: Input should be a valid dictionary"):
        parse_params(changed(machine="cpu"), environment={"MODE_DEVICE": "cuda"})


PRETRAINED = {
    **MINIMAL,
    "seed": {"from": "pretrained", "name": "ViT-B-16", "weights": "laion2b_s34b_b88k"},
    "model": {},
    "training": {"seed_epochs": 0, "epochs": 4},
}


@pytest.mark.parametrize(
    ("kind", "retrieval", "protocol"),
    [
        ("calibrated", None, "query"),
        ("calibrated", "query", "query"),
        ("calibrated", "together", "together"),
        ("calibrated", "paper", "paper"),
        ("published", None, "together"),
        ("published", "paper", "paper"),
        ("paper", None, "together"),
        ("paper", "paper", "paper"),
    ],
)
def test_how_retrieval_is_routed(kind: str, retrieval: str | None, protocol: str) -> None:
    routing = parse_params(changed(routing={"kind": kind, "retrieval": retrieval})).routing
    assert (routing.protocol, routing.by_query) == (protocol, protocol == "query")


def test_a_pretrained_seed_brings_its_model() -> None:
    params = parse_params({**PRETRAINED, "embedding": {"kind": "seed", "made_from": "models/seed"}})
    assert params.seed.pretrained
    assert params.embedding.encoder == "models/seed"
    assert params.embedding.fit_on is None
    assert params.model_dump()["seed"]["from"] == "pretrained"
    assert "seed.from" in dict(explanations())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"name": "ViT-B-32"}}, r"model: the architecture is that of seed\.name, 'ViT-B-16'"),
        ({"training": {"seed_epochs": 2, "epochs": 4}}, r"training\.seed_epochs: 2, but a pretrained seed"),
        ({"seed": {"from": "scratch"}, "training": {"seed_epochs": 2, "epochs": 4}}, "model: give either"),
        ({"seed": {"from": "scratch"}, "model": {"name": "ViT-B-32"}}, r"training\.seed_epochs: 0, but a seed"),
        ({"seed": {"from": "scratch", "name": "ViT-B-32"}}, "those of a pretrained seed"),
        ({"seed": {"from": "pretrained"}}, "needs `name`"),
        ({"seed": {"from": "pretrained", "name": "hf-hub:a/b", "weights": "x"}}, "brings its own"),
        ({"seed": {"from": "nowhere"}}, r"seed\.from"),
        ({"embedding": {"kind": "seed"}}, "needs `made_from: models/seed`"),
        ({"embedding": {"kind": "seed", "made_from": "models/seed", "name": "x"}}, "and no name"),
        ({"training": {"seed_epochs": 0, "epochs": 4, "layer_decay": 0.0}}, r"training\.layer_decay"),
    ],
)
def test_seeds_that_cannot_be(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ModeError, match=message):
        parse_params({**PRETRAINED, **changes})


def test_an_adapter_is_a_section_that_may_be_left_out() -> None:
    minimal = {"sources": {"base": {"shards": "s"}}, "experts": {}, "model": {"name": "ViT-B-32"}}
    assert parse_params(minimal).training.adapter is None
    given = parse_params({**minimal, "training": {"adapter": {"rank": 8}}}).training.adapter
    assert given is not None
    assert (given.kind, given.scale, given.targets, given.lr) == ("lora", 16.0, None, None)
    assert dict(explanations())["training.adapter.rank"].startswith("Rows of A")
    for adapter, message in (
        ({"rank": 0}, "training.adapter.rank: Input should be greater than 0, not 0"),
        ({"rank": -1}, "training.adapter.rank"),
        ({"alpha": 0.0}, "training.adapter.alpha"),
        ({"targets": []}, "training.adapter.targets"),
        ({"targets": "*.attn"}, "training.adapter.targets"),
        ({"kind": "dora"}, "training.adapter.kind"),
        ({"ranks": 4}, "training.adapter.ranks: unknown parameter"),
    ):
        with pytest.raises(ModeError, match=message) as error:
            parse_params({**minimal, "training": {"adapter": adapter}})
        assert "\n" not in str(error.value)


def test_copies_on_all_pairs_are_of_experts_that_there_are() -> None:
    given = {"sources": {"base": {"shards": "s"}}, "experts": {"expert-0": {"cluster": 0}}, "model": {"name": "x"}}
    assert parse_params({**given, "full": ["expert-0"]}).full == ["expert-0"]
    with pytest.raises(ModeError, match="full: no expert is called 'expert-1'"):
        parse_params({**given, "full": ["expert-1"]})


TARS = {"base": {"shards": "tars"}, "base-2": {"shards": "tars", "continues": "base"}}
UPDATE = {"continues": "expert-1", "source": "base-2", "cluster": 1, "replays": "base"}


def arrived(**changes: object) -> dict[str, object]:
    experts = {f"expert-{number}": {"cluster": number} for number in range(2)}
    return changed(**{"sources": TARS, "experts": experts, **changes})


def test_a_source_that_continues_another_has_its_clusters() -> None:
    params = parse_params(arrived(sources={**TARS, "base": {"shards": "tars", "fine": 8, "coarse": 3}}))
    assert params.clusters_of("base-2") == (8, 3)
    assert (params.root_of("base-2"), params.root_of("base")) == ("base", "base")
    assert params.continuations_of("base") == ["base-2"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"continues": "no"}, "sources.x.continues: no other source is called 'no'"),
        ({"continues": "x"}, "sources.x.continues: no other source is called 'x'"),
        ({"continues": "base-2"}, "sources.x.continues: 'base-2' itself continues 'base': name that"),
        ({"continues": "base", "fine": 8}, "sources.x: fine and coarse are those of 'base'"),
        ({"continues": "base", "checksum": True}, "sources.x.checksum: not that of 'base', which it continues"),
        ({"continues": "base", "filters": ["a > 1"]}, "sources.x.filters: not that of 'base'"),
        ({"continues": "base", "shards": "glyphs"}, "the built-in data are made at once"),
        ({"continues": "drawn"}, "the built-in data are made at once"),
    ],
)
def test_a_continuation_that_cannot_be(source: dict[str, object], message: str) -> None:
    sources = {**TARS, "drawn": {"shards": "glyphs"}, "x": {"shards": "tars", **source}}
    with pytest.raises(ModeError) as caught:
        parse_params(arrived(sources=sources))
    assert message in str(caught.value)


def test_other_families_arrive_in_the_built_in_data() -> None:
    sources = {
        "base": {"shards": "glyphs"},
        "later": {"shards": "glyphs", "continues": "base", "families": {"chess": 4}},
    }
    assert parse_params(arrived(sources=sources, updates={})).root_of("later") == "base"
    with pytest.raises(ModeError, match="families are those of the built-in data"):
        parse_params(arrived(sources={**TARS, "x": {"shards": "tars", "families": {"chess": 4}}}))


def test_a_continuation_has_no_expert_and_no_seed_of_its_own() -> None:
    with pytest.raises(ModeError, match="'base-2' continues 'base' and has no clusters of its own"):
        parse_params(arrived(experts={"a": {"source": "base-2", "cluster": 0}}))
    with pytest.raises(ModeError, match=r"training\.source: 'base-2' continues 'base'"):
        parse_params(arrived(training={"source": "base-2"}))


def test_an_expert_is_known_by_its_newest_version() -> None:
    sources = {**TARS, "base-3": TARS["base-2"]}
    second = {**UPDATE, "continues": "v2", "source": "base-3"}
    params = parse_params(arrived(sources=sources, updates={"v3": second, "v2": UPDATE}))
    assert params.versions == {"expert-0": ["expert-0"], "expert-1": ["expert-1", "v2", "v3"]}
    assert {name: expert.cluster for name, expert in params.members.items()} == {"expert-0": 0, "v3": 1}
    assert [params.sources_of(name) for name in ("expert-1", "v2", "v3")] == [
        ["base"],
        ["base", "base-2"],
        ["base", "base-2", "base-3"],
    ]
    assert [params.versions_of(name) for name in ("expert-0", "v2", "base")] == [
        ["expert-0"],
        ["expert-1", "v2", "v3"],
        [],
    ]
    trainings = [role.model(key) for role, key in params.trainings]
    assert trainings == ["seed", "dense", "dense-long", "expert-0", "expert-1", "v3", "v2"]
    assert [params.unseen_by(name) for name in ("expert-0", "expert-1", "v2")] == [["base-2", "base-3"], [], []]


def test_what_is_there_already_and_what_is_not_asked_for_is_no_training() -> None:
    pretrained = {"seed": {"from": "pretrained", "name": "hf-hub:a/b"}, "training": {"seed_epochs": 0}, "model": {}}
    params = parse_params(arrived(**pretrained, baselines={"dense_long": False}, full=["expert-1"]))
    assert [role.model(key) for role, key in params.trainings] == ["dense", "full-expert-1", "expert-0", "expert-1"]


@pytest.mark.parametrize(
    ("updates", "message"),
    [
        ({"a": {**UPDATE, "continues": "no"}}, "updates.a.continues: no expert and no update is called 'no'"),
        ({"a": {**UPDATE, "continues": "a"}}, "updates.a.continues: 'a' leads back to 'a'"),
        ({"a": {**UPDATE, "continues": "b"}, "b": {**UPDATE, "continues": "a"}}, "'b' leads back to 'a'"),
        ({"a": UPDATE, "b": UPDATE}, "updates.b.continues: 'a' already goes on from 'expert-1'"),
        ({"a": UPDATE, "b": {**UPDATE, "continues": "a"}}, "updates.b.source: 'a' has seen 'base-2' already"),
        ({"a": {**UPDATE, "cluster": 0}}, "updates.a.cluster: 0, but expert-1 has cluster 1"),
        ({"a": {**UPDATE, "source": "base"}}, "updates.a.source: 'base' is no source that continues 'base'"),
        ({"a": {**UPDATE, "source": "no"}}, "updates.a.source: 'no' is no source that continues 'base'"),
        ({"a": {**UPDATE, "replays": "base-2"}}, "updates.a.replays: 'base-2', but expert-1 has pairs of 'base'"),
        ({"a": {**UPDATE, "replay_share": 1.0}}, "updates.a.replay_share: Input should be less than 1"),
        ({"expert-0": UPDATE}, "updates.expert-0: that name belongs to another model"),
        ({"dense": UPDATE}, "updates.dense: that name belongs to another model"),
    ],
)
def test_an_update_that_cannot_be(updates: dict[str, object], message: str) -> None:
    with pytest.raises(ModeError) as caught:
        parse_params(arrived(updates=updates))
    assert message in str(caught.value)


def test_an_adapter_is_trained_on_but_never_as_another_one() -> None:
    params = parse_params(arrived(updates={"a": UPDATE}, training={"adapter": {"rank": 8}}))
    assert params.versions["expert-1"] == ["expert-1", "a"]
    with pytest.raises(ModeError, match=r"updates\.a\.adapter: unknown parameter") as caught:
        parse_params(arrived(updates={"a": {**UPDATE, "adapter": {"rank": 4}}}, training={"adapter": {"rank": 8}}))
    assert "\n" not in str(caught.value)
