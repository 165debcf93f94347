"""Applies `init_from`: the parts that a run starts from, the options of its connector, and how it shows videos."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path

from ..connectors import CONNECTORS
from ..data.processor import Processor
from ..data.tile_styles import LLAVA_NEXT
from ..data.video_plan import VideoPlan
from ..files import read_json, write_json
from ..model.folder import is_model_folder, read_manifest
from ..model.parts import FIXED
from ..runs.fingerprints import fingerprint
from ..runs.folder import RunFolder
from ..settings import Run, Stage
from .handover import PART
from .processing import video_options


def take_in(run: Run, folder: RunFolder) -> tuple[Run, list[str]]:
    """Return the settings with `init_from` applied, and warnings about overridden keys (see `adopt_connector`).

    The first call imports a published model as a model folder within the run folder (see
    `vlmtrain.interop.importing`). Raises ValueError naming the file, the tensor and what was expected.
    """
    finished = [name for name in run.stages if folder.is_finished(name)]
    run, overruled = adopt_connector(_imported(run, folder), finished)
    run, of_videos = adopt_videos(run, finished)
    return run, [*overruled, *overruled_fit(run, finished), *of_videos, *overruled_controls(run)]


def with_init_from(run: Run) -> Run:
    """The settings with the connector and the videos of the model folder `init_from`, for commands that do not train.

    Raises ValueError if `init_from` is not a model folder, or if the command requires another connector.
    """
    if run.init_from is None:
        return run
    read_manifest(Path(run.init_from))
    return adopt_videos(adopt_connector(run, ())[0], ())[0]


def _imported(run: Run, folder: RunFolder) -> Run:
    source = run.init_from and Path(run.init_from)
    if not source or not (source.is_file() or ((source / "config.json").exists() and not is_model_folder(source))):
        return run
    parts = {}
    if source.is_file():  # only a projector: the command names the models that it was trained with
        parts = {"llm": run.llm.path, "template": run.llm.chat_template, "vision": run.vision.path}
    target, record = folder.root / "imported", folder.root / "imported.json"
    wanted = {"source": str(source.resolve()), **parts, "fingerprint": fingerprint(source)}
    if not (target.exists() and record.exists() and read_json(record) == wanted):
        from ..interop.importing import import_model

        record.unlink(missing_ok=True)
        shutil.rmtree(target, ignore_errors=True)
        import_model(source, target, **parts)
        write_json(record, wanted)
    return run.with_values(init_from=str(target))


def adopt_connector(run: Run, finished: Collection[str]) -> tuple[Run, list[str]]:
    """Return the settings with the connector of `init_from`, if the run uses it, and a warning about overridden keys.

    finished: the finished stages of the run. Raises ValueError naming the keys if the command, or a stage that builds
    a new connector, requires a different one.
    """
    stage, file = _heir(run, finished), Path(run.init_from or "", PART, "config.json")
    if stage is None or not file.exists():
        return run, []
    held = {key: value for key, value in read_json(file).items() if key not in FIXED}
    kind, chosen, anew = held["name"], run.connector, stage.builds_connector
    if chosen.name != kind and (anew or PART in run.named):
        raise ValueError(
            f"connector={chosen.name}, but init_from={run.init_from} holds the connector {kind}: set "
            f"connector={kind}, or list {PART} in {stage.prefix}.fresh to start a new one from random weights"
        )
    if anew:
        return run, []
    held = {"name": kind, **CONNECTORS.options(kind), **held}
    options = chosen.options if chosen.name == kind else {}
    differing = [key for key in held if key in options and options[key] != held[key]]
    for key in differing:
        if f"{PART}.{key}" in run.named:
            raise ValueError(
                f"{PART}.{key}={options[key]}, but the connector in init_from={run.init_from} has {held[key]} and is "
                "already trained"
            )
    said = [f"connector={chosen.name} ({kind} is used)"] if chosen.name != kind else []
    said += [f"{PART}.{key}={options[key]} ({held[key]} is used)" for key in differing]
    run = run.with_values(connector=held)
    return run, [f"init_from={run.init_from} overrides {', '.join(said)}"] if said else []


def _heir(run: Run, finished: Collection[str]) -> Stage | None:
    """The stage that receives the connector of `init_from`; None if there is none."""
    ahead = (stage for stage in run.stages.values() if stage in run.wanted or stage.name in finished)
    stage = next((stage for stage in ahead if PART in stage.parts), None)
    return None if run.init_from is None or stage is None or PART in stage.fresh else stage


def adopt_videos(run: Run, finished: Collection[str]) -> tuple[Run, list[str]]:
    """Return the settings with the videos of the model in `init_from`, if the run uses its connector, and warnings.

    A stage shows videos as the model was trained, apart from keys that the command sets. If the recipe sets some, or
    only one of them shows images at their own sizes, the stage keeps its keys, and the warning lists the differences.
    """
    if _heir(run, finished) is None or not Path(run.init_from, "processor", "processor.json").exists():
        return run, []
    geometry = Processor.from_pretrained(run.init_from).geometry
    if geometry is None or geometry.video is None:
        return run, []
    held, initial = (asdict(video_options(plan, geometry.fit)) for plan in (geometry.video, VideoPlan()))
    stages, said = dict(run.composed["stages"]), []
    for name, stage in run.stages.items():
        chosen, prefix = asdict(stage.video), f"{stage.prefix}.video"
        own = {key: value for key, value in chosen.items() if not {prefix, f"{prefix}.{key}"} & set(run.named)}
        differing = {key: value for key, value in own.items() if value != held[key]}
        if not differing or not {"vision", PART} <= set(stage.parts):
            continue
        is_open = all(value == initial[key] for key, value in own.items())
        adopts = is_open and (stage.image_fit == "native") == (geometry.fit == "native")
        if adopts:
            stages[name] = {**stages[name], "video": chosen | {key: held[key] for key in differing}}
        if stage in run.wanted and name not in finished:
            verb, used = ("overrides", " is used") if adopts else ("was trained with other settings of videos than", "")
            keys = ", ".join(f"{prefix}.{key}={value} ({held[key]}{used})" for key, value in differing.items())
            said.append(f"init_from={run.init_from} {verb} {keys}")
    return run.with_values(stages=stages), said


def overruled_fit(run: Run, finished: Collection[str]) -> list[str]:
    """Return a warning if the next stage preprocesses images differently from the model in `init_from`."""
    ahead = (stage for stage in run.wanted if stage.name not in finished)
    stage = next((stage for stage in ahead if "vision" in stage.parts), None)
    file = Path(run.init_from or "", "processor", "processor.json")
    if run.init_from is None or finished or stage is None or not file.exists():
        return []
    key, chosen = "image_fit", stage.image_fit
    geometry = read_json(file).get("geometry") or {}
    held = geometry.get("fit", chosen)
    if held == chosen == "tiles":
        key, chosen, held = "image_tile_style", stage.image_tile_style, geometry.get("tile_style", LLAVA_NEXT)
        if held == chosen and geometry.get("tile_margin"):
            key, chosen, held = "image_tiles_margin", stage.image_tiles_margin, geometry["tile_margin"]
    if held == chosen:
        return []
    key = f"{stage.prefix}.{key}"
    return [
        f"{key}={chosen}, but the model in init_from={run.init_from} was trained with {held}; set {key}={held} to keep "
        "its preprocessing"
    ]


def overruled_controls(run: Run) -> list[str]:
    """Return warnings if the settings replace the tokens around images, or after their rows, of `init_from`."""
    file = Path(run.init_from or "", "processor", "processor.json")
    if run.init_from is None or not file.exists():
        return []
    geometry, said = read_json(file).get("geometry") or {}, []
    for key, chosen, held in (
        ("image_frame", run.llm.image_frame and list(run.llm.image_frame), list(geometry.get("frame", ("", "")))),
        ("image_frame_shared", run.llm.image_frame_shared, geometry.get("frame_shared", False)),
        ("image_newline", run.llm.image_newline, geometry.get("newline", "")),
    ):
        if chosen not in (None, held):
            kept = f"; leave out llm.{key} to keep {held}" if held not in ("", ["", ""]) else ""
            said.append(f"llm.{key}={chosen} replaces the tokens of init_from={run.init_from}{kept}")
    return said
