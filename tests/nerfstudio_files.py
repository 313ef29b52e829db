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


def nerfacto_tcnn(appearance: int = 8, joined: str = "mlp_base.model", levels: int = 4) -> dict[str, Any]:
    """The same sizes in tiny-cuda-nn's flat vectors; levels of 4, 8, 16, 32 have 64, 512, 1024, 1024 entries."""
    entries = 64 + 512 + 1024 + 1024
    out = {k: v for k, v in nerfacto_torch(appearance=appearance).items() if ".mlp_" not in k}
    network = torch.cat([random(64 * 16, scale=0.4), random(16 * 64, scale=0.2, seed=1)])
    inputs = -(-(31 + appearance) // 16) * 16
    head = [
        random(64 * inputs, scale=0.2, seed=2),
        random(64 * 64, scale=0.2, seed=3),
        random(16 * 64, scale=0.3, seed=4),
    ]
    return out | {
        f"field.{joined}.params": torch.cat([network, random(2 * entries, seed=5)]),
        "field.mlp_head.tcnn_encoding.params": torch.cat(head),
        "field.direction_encoding.tcnn_encoding.params": torch.zeros(0),
    }


def occupancy_grid(share: float = 0.5, levels: int = 2, n: int = 8) -> dict[str, Tensor]:
    """nerfacc's estimator: nested cubes, each twice as wide."""
    cells = torch.rand(levels, n, n, n, generator=torch.Generator().manual_seed(1)) < share
    return {
        "scene_aabb": BOX.flatten(),
        "occupancy_grid.resolution": torch.tensor([n, n, n]),
        "occupancy_grid.aabbs": torch.stack([BOX.flatten() * 2**k for k in range(levels)]),
        "occupancy_grid.occs": torch.zeros(levels * n**3),
        "occupancy_grid.binaries": cells,
    }


def tensorf_state(cp: bool = False) -> dict[str, Tensor]:
    """vm or cp encoding, ranks 4 and 6, 9^3 vertices, 5 colour features, width 16."""
    out = {"field.aabb": torch.tensor([[-1.0, -1.2, -0.8], [1.0, 0.9, 1.1]])}
    for kind, rank in (("density", 4), ("color", 6)):
        if not cp:
            out[f"field.{kind}_encoding.plane_coef"] = random(3, rank, 9, 9)
        out[f"field.{kind}_encoding.line_coef"] = random(3, rank, 9, 1)
    out["field.B.weight"] = random(5, 6 if cp else 18, scale=0.3)
    out |= linear("field.mlp_head.layers.0", 16, 8 * 5) | linear("field.mlp_head.layers.1", 16, 16)
    return out | linear("field.field_output_rgb.net", 3, 16)


def vanilla_state(width: int = 24, depth: int = 6, skip: int = 4) -> dict[str, Tensor]:
    """Coarse and fine networks of the program's encodings."""
    out: dict[str, Tensor] = {}
    for seed, name in enumerate(("field_coarse", "field_fine")):
        for i in range(depth):
            wide = 63 if i == 0 else width + 63 * (i == skip)
            out |= linear(f"{name}.mlp_base.layers.{i}", width, wide, seed)
        out |= linear(f"{name}.field_output_density.net", 1, width, seed)
        out |= linear(f"{name}.mlp_head.layers.0", 16, 27 + width, seed)
        out |= linear(f"{name}.mlp_head.layers.1", 16, 16, seed + 5)
        out |= linear(f"{name}.field_heads.0.net", 3, 16, seed)
    return out
