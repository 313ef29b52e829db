"""Hand-made nerfstudio checkpoints in the program's own key tree (layouts section 7), with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CONFIG = """!!python/object:nerfstudio.engine.trainer.TrainerConfig
_target: !!python/name:nerfstudio.engine.trainer.Trainer ''
pipeline: !!python/object:nerfstudio.pipelines.base_pipeline.VanillaPipelineConfig
  datamanager: !!python/object:nerfstudio.data.datamanagers.base_datamanager.VanillaDataManagerConfig
    dataparser: !!python/object:nerfstudio.data.dataparsers.blender_dataparser.BlenderDataParserConfig
      _target: !!python/name:nerfstudio.data.dataparsers.blender_dataparser.Blender ''
      scale_factor: 1.0
  model: !!python/object:nerfstudio.models.nerfacto.NerfactoModelConfig
    _target: !!python/name:nerfstudio.models.nerfacto.NerfactoModel ''
"""
MODEL: dict[str, Any] = {
    "average_init_density": 0.5,
    "background_color": "white",
    "base_res": 4,
    "disable_scene_contraction": True,
    "far_plane": 6.0,
    "near_plane": 2.0,
    "use_average_appearance_embedding": True,
}
BOX = torch.tensor([[-1.5, -1.5, -1.5], [1.5, 1.5, 1.5]])


def config(**model: Any) -> str:
    """A config.yml whose pipeline.model says ``model`` over :data:`MODEL`; None leaves a key out."""
    lines = [
        f"    {k}: {v if isinstance(v, (str, list)) else repr(v).lower()}" for k, v in model.items() if v is not None
    ]
    return CONFIG + "\n".join(lines) + "\n"


def saved(
    folder: Path, state: dict[str, Any], step: int = 7, prefix: str = "_model.", model: dict[str, Any] | None = None
) -> Path:
    """A run folder with ``state`` at ``step``; the path of the checkpoint."""
    path = folder / "nerfstudio_models" / f"step-{step:09d}.ckpt"
    path.parent.mkdir(exist_ok=True)
    pipeline = {prefix + k: v for k, v in state.items()}
    torch.save({"step": step, "pipeline": pipeline, "optimizers": {}, "schedulers": {}, "scalers": {}}, path)
    (folder / "config.yml").write_text(config(**{**MODEL, **(model or {})}))
    (folder / "dataparser_transforms.json").write_text(
        '{"transform": [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]], "scale": 1.0}'
    )
    return path


def random(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 31 * sum(shape)))


def linear(name: str, units: int, wide: int, seed: int = 0) -> dict[str, Tensor]:
    weight = random(units, wide, scale=1.4 / wide**0.5, seed=seed)
    return {f"{name}.weight": weight, f"{name}.bias": random(units, scale=0.2, seed=seed)}


def nerfacto_torch(seed: int = 0, appearance: int = 8) -> dict[str, Any]:
    """4 levels from 4 to 32, tables of 2^10, torch implementation; 3 images."""
    out: dict[str, Any] = {
        "device_indicator_param": torch.zeros(0),
        "field.aabb": BOX.clone(),
        "field.max_res": torch.tensor(32),
        "field.num_levels": torch.tensor(4),
        "field.log2_hashmap_size": torch.tensor(10),
        "field.embedding_appearance.embedding.weight": random(3, max(appearance, 1), seed=seed),
        "field.mlp_base.model.0.hash_table": random(4 << 10, 2, seed=seed),
        "proposal_networks.0.encoding.hash_table": random(16, 2),
        "lpips.net.lin0.model.1.weight": random(1, 4, 1, 1),
        "camera_optimizer.pose_adjustment": torch.zeros(3, 6),
    }
    out |= linear("field.mlp_base.model.1.layers.0", 64, 8, seed)
    out |= linear("field.mlp_base.model.1.layers.1", 16, 64, seed)
    out |= linear("field.mlp_head.layers.0", 64, 31 + appearance, seed)
    out |= linear("field.mlp_head.layers.1", 64, 64, seed + 1)
    out |= linear("field.mlp_head.layers.2", 3, 64, seed)
    return out
