"""Read what plans are made from without a run: configuration, profiles and importance in files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from coordinator.config.run import ServeConfig
from coordinator.planning.fixed import check_config
from coordinator.planning.problem import PlanningProblem, ServerProfile, planning_length
from edge_sdk.errors import ConfigError, ModelError, one_line
from edge_sdk.lora.targets import ModelFacts
from profiler.profile import DeviceProfile


def read_problem(
    config: ServeConfig, profiles: Mapping[str, DeviceProfile], importance: Path | None
) -> PlanningProblem:
    """Return what plans are made from; of the model, only its config.json is read.

    Raises:
        ConfigError: as `check_config`; or a file cannot be used.
    """
    from edge_sdk.lora.targets import coverage, find_targets
    from edge_sdk.model.layout import find_layout, usable_positions
    from edge_sdk.model.shape import model_shape
    from edge_sdk.model.weights import load_config as load_model_config

    model_config = load_model_config(_config_folder(config), len(config.label_names))
    layout = find_layout(model_config, config.task)
    facts = ModelFacts(layout, find_targets(model_config, config.task, layout, config.lora))
    check_config(config, facts)
    positions = usable_positions(model_config, config.task)
    if config.max_length is not None and not 2 <= config.max_length <= positions:
        raise ConfigError(
            f"max_length: {config.max_length} is outside 2..{positions} (the model's positions)"
        )
    return PlanningProblem(
        config=config,
        facts=facts,
        model=model_shape(model_config, config.task, layout),
        coverage=coverage(model_config, config.task, layout, facts.targets),
        profiles=profiles,
        server=ServerProfile.here(config),
        length=planning_length(config, positions),
        importance=None if importance is None else _read_importance(importance, facts.targets),
    )


def _config_folder(config: ServeConfig) -> Path:
    """Return a folder with the model's config.json; nothing else of a model is downloaded."""
    from edge_sdk.model.weights import locate

    path = Path(config.model).expanduser()
    if path.is_dir() or path.is_absolute() or config.model.startswith((".", "~")):
        return locate(config.model)
    from huggingface_hub import hf_hub_download

    try:
        file = hf_hub_download(config.model, "config.json", revision=config.revision)
    except Exception as error:  # noqa: BLE001 - the hub client raises a wide family of errors
        raise ModelError(
            f"model {config.model!r} is neither a local folder nor available from the hub: "
            f"{one_line(error)}"
        ) from error
    return Path(file).parent


def _read_importance(path: Path, known: Iterable[str]) -> dict[str, float]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold an object, importance by weight name")
    names = set(known)
    for name, value in values.items():
        if name not in names:
            raise ConfigError(f"{path}: {name!r} is no adapted weight of this model")
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 0.0 <= value < math.inf:
            raise ConfigError(f"{path}: {name!r} must be a number of at least 0, got {value!r}")
    return {name: float(value) for name, value in values.items()}
