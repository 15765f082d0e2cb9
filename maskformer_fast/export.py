"""``python -m maskformer_fast.export CHECKPOINT --output BUNDLE``: a checkpoint as a bundle to deploy."""

from __future__ import annotations

import logging
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import tyro

import maskformer_fast
from maskformer_fast.checkpoint import load_weights
from maskformer_fast.cli import leading_path, parse, run_command
from maskformer_fast.config import TASKS, Config, ModelConfig, Task, TestConfig, check
from maskformer_fast.deploy.bundle import Bundle, extend_bundle, write_bundle
from maskformer_fast.deploy.manifest import (
    MANIFEST_NAME,
    BundleError,
    Manifest,
    Postprocess,
    Preprocess,
    Shape,
)
from maskformer_fast.deploy.onnx import FLAVOURS, Flavour, ParityError, check_parity, export_graph
from maskformer_fast.deploy.tensorrt import EngineConfig, build_engine
from maskformer_fast.predictor import Predictor, load
from maskformer_fast.recipes import load_recipe, recipe_names

logger = logging.getLogger(__name__)
