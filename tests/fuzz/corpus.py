"""Sound seeds of every format, as small as it allows, from the hand-made files of the formats' tests.

``python -m tests.fuzz.corpus FOLDER`` writes them, one folder a seed: ``FOLDER/<format>--<n>/``, in it the file that is
fuzzed (named in ``seed.json``) and whatever lies beside it. Making them may need torch; reading them does not.

A new format adds a function to :data:`BUILDERS`, or, if it writes small files, nothing: then its own writer is used.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from pvdconvert.registry import Registry, default

MAX_BYTES = 64 << 20
Built = Iterator[tuple[Path, Mapping[str, str]]]
"""Files, each with the extra entries (``--extra``) that it needs."""


def native(at: Path) -> Built:
    from tests.test_formats_native import parts

    default().format("pvdconvert").write(parts(), at / "a.safetensors")
    yield at / "a.safetensors", {}


def bmild(at: Path) -> Built:
    from tests.test_formats_nerf import keras, save_keras

    yield save_keras(at / "model_fine_000010.npy", keras(4, 8)), {}
    (at / "config.txt").write_text("dataset_type = blender\nwhite_bkgd = True\n")
    yield save_keras(at / "plain.npy", keras(5, 8, views=False)), {}


def krrish94(at: Path) -> Built:
    from tests.test_formats_nerf import FlexibleNeRF, save_krrish94

    (at / "config.yml").write_text("dataset: {type: blender, near: 2, far: 6}\nmodels: {coarse: {num_layers: 4}}\n")
    yield save_krrish94(at / "a.ckpt", FlexibleNeRF(4, 8, 4, 6), FlexibleNeRF(4, 8, 4, 6)), {}
    yield save_krrish94(at / "b.ckpt", None, FlexibleNeRF(4, 8, 3, 10, False)), {}


def jiayi(at: Path) -> Built:
    sizes = {"fc_1.0": (63, 16), "fc_2.0": (16, 16), "fc_3.0": (79, 16), "fc_noact": (16, 16), "fc_dir.0": (43, 8),
             "sigma": (16, 1), "rgb.0": (8, 3)}  # fmt: skip
    net = {k: torch.nn.Linear(*s).double() for k, s in sizes.items()}
    state = {f"{k}.{p}": v for k, layer in net.items() for p, v in layer.state_dict().items()}
    torch.save({"epoch": 5, "model_state_dict": state, "psnrs": [1.0]}, at / "a.pt")
    yield at / "a.pt", {}


def nerf_pl(at: Path) -> Built:
    from tests.test_formats_nerf_pl import BLENDER, LLFF, network, save

    yield save(at / "a.ckpt", network(1, 8), network(2, 8), BLENDER), {}
    yield save(at / "b.ckpt", network(1, 8, 4, 2), None, LLFF), {"focal": "407.5"}


def nerf_pytorch(at: Path) -> Built:
    from tests.test_formats_nerf_pytorch import Net, save

    (at / "args.txt").write_text("dataset_type = blender\nwhite_bkgd = True\nN_importance = 128\n")
    yield save(at / "a.tar", Net(4, 8, 2, (10, 4), 1), Net(4, 8, 2, (10, 4), 1)), {}
    yield save(at / "b.tar", Net(3, 8, 9, (6, 2), None)), {}


def torch_ngp(at: Path) -> Built:
    from tests.test_formats_torch_ngp import saved, state

    yield saved(at, state(levels=4, table=8)), {"desired_resolution": "2048"}
    bits = {"density_bitfield": torch.arange(128**3 // 8, dtype=torch.int64).to(torch.uint8)}
    yield saved(at, {**state(levels=3, table=6), **bits}), {"desired_resolution": "2048"}


def instant_ngp(at: Path) -> Built:
    from tests.snapshots import make, put

    grid = {"otype": "HashGrid", "n_levels": 3, "n_features_per_level": 2, "log2_hashmap_size": 6,
            "base_resolution": 4, "per_level_scale": 1.5}  # fmt: skip
    frequency = {"otype": "Frequency", "n_frequencies": 4}
    yield put(at / "a.msgpack", make(grid), packed=False), {}
    yield put(at / "b.ingp", make(grid, half=False, codes=[[0.1, 0.2]])), {}
    yield put(at / "c.msgpack", make(frequency), packed=False), {}


def tensorf(at: Path) -> Built:
    from tests.test_formats_tensorf import hand_made

    for k, (model, mode) in enumerate((("TensorVMSplit", "MLP_Fea"), ("TensorCP", "SH"), ("TensorVM", "RGB"))):
        torch.save(hand_made(model, mode), at / f"{k}.th")
        yield at / f"{k}.th", {}


def pvd(at: Path) -> Built:
    from tests.test_formats_pvd import mlp_model, saved, vm_model, volume_model

    for k, model in enumerate((vm_model(), mlp_model(16), volume_model())):
        (at / str(k)).mkdir()
        yield saved(at / str(k), model), {}


def nerfstudio(at: Path) -> Built:
    from tests.nerfstudio_files import nerfacto_torch, saved

    yield saved(at, nerfacto_torch()), {}


def svox(at: Path) -> Built:
    from tests.test_formats_svox import made, save

    for k, kind in enumerate(("SH4", "SG3", "RGBA")):
        yield save(at / f"{k}.npz", made(kind, nodes=5)), {}


def svox2(at: Path) -> Built:
    from tests.test_formats_svox2 import made, save

    yield save(at / "a.npz", made()), {}


def dvgo(at: Path) -> Built:
    from tests.test_formats_dvgo import make, saved

    yield saved(at, make()), {}
    yield saved(at, make(fine=False), "coarse_last.tar"), {}
    yield saved(at, make(factored=True, direct=False), "factored.tar"), {}


def jaxnerf(at: Path) -> Built:
    from tests.test_formats_jaxnerf import network, save

    yield save(at / "checkpoint_1000000", network(1), network(2)), {}


def torch_ngp_tensorf(at: Path) -> Built:
    from tests.test_formats_torch_ngp_tensorf import saved, state

    for kind in ("vm", "cp"):
        yield saved(at, state(kind)), {}


def ngp_pl(at: Path) -> Built:
    from tests.test_formats_ngp_pl import state

    torch.save({"epoch": 2, "global_step": 30, "state_dict": state()}, at / "a.ckpt")
    yield at / "a.ckpt", {}


def kilonerf(at: Path) -> Built:
    from tests.test_formats_kilonerf import networks, save

    yield save(at / "a.pth", networks()), {"resolution": "3,5,2", "bounds": "-1,-1,-1,1,1,1"}
    yield save(at / "b.pth", networks(independent=True), turned=True), {"resolution": "3,5,2", "bounds": "0,0,0,1,1,1"}


BUILDERS: dict[str, Callable[[Path], Built]] = {
    "pvdconvert": native,
    "bmild": bmild,
    "krrish94": krrish94,
    "jiayi": jiayi,
    "nerf-pl": nerf_pl,
    "nerf-pytorch": nerf_pytorch,
    "torch-ngp": torch_ngp,
    "instant-ngp": instant_ngp,
    "apchenstu-tensorf": tensorf,
    "aaai2023-pvd": pvd,
    "nerfstudio": nerfstudio,
    "svox": svox,
    "svox2": svox2,
    "dvgo": dvgo,
    "jaxnerf": jaxnerf,
    "kilonerf": kilonerf,
    "ngp-pl": ngp_pl,
    "torch-ngp-tensorf": torch_ngp_tensorf,
}


def written(name: str, registry: Registry) -> Iterator[tuple[Path, Mapping[str, str]]]:
    """Small files of a format's own writer."""
    from pvdconvert.testing.formats import FormatSubject

    for path, _ in FormatSubject(name, registry).written.values():
        yield path, {}


def build(folder: Path, registry: Registry | None = None) -> dict[str, int]:
    """Write the seeds of every readable format into ``folder``; how many each has."""
    registry = registry or default()
    torch.manual_seed(0)
    counts: dict[str, int] = {}
    for name, entry in registry.formats().items():
        if not entry.spec.can_read:
            continue
        work = folder / f"work-{name}"
        work.mkdir(parents=True)
        made = BUILDERS[name](work) if name in BUILDERS else written(name, registry) if entry.spec.can_write else ()
        count = 0
        for path, extra in made:
            if path.stat().st_size > MAX_BYTES:
                continue
            at = folder / f"{name}--{count}"
            # The whole run folder of formats that look above the file's own.
            root = work if path.is_relative_to(work) and path.parent != work else path.parent
            shutil.copytree(root, at)
            (at / "seed.json").write_text(
                json.dumps({"format": name, "file": str(path.relative_to(root)), "extra": dict(extra)})
            )
            count += 1
        counts[name] = count
        shutil.rmtree(work)
    return counts


if __name__ == "__main__":
    target = Path(sys.argv[1])
    told: dict[str, Any] = build(target)
    print(json.dumps(told))
