"""nerfstudio: a run folder, or ``step-*.ckpt`` with config.yml (layouts section 7). Imports no torch.

nerfacto and instant-ngp (torch and tiny-cuda-nn) -> ``ngp``; tensorf -> ``tensorf``; vanilla-nerf -> ``nerf``. What the
checkpoint lacks (average_init_density, contraction, background) is in config.yml alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from pvdconvert.containers import Manifest, torch_zip_writer
from pvdconvert.errors import InputError
from pvdconvert.plugin import Config, FormatBase, FormatSpec, LazyTensor, Limits, Match, Parts, ReadOptions
from pvdconvert.scene import IDENTITY, Box, RaySpace, Scene
from pvdconvert_formats import _nerfstudio_field as nerfacto
from pvdconvert_formats import _nerfstudio_other as other
from pvdconvert_formats import _nerfstudio_write as writer
from pvdconvert_formats._lazy import need
from pvdconvert_formats._nerf_layers import assume, assumption_note, two_networks
from pvdconvert_formats._nerfstudio_run import Run, checkpoint_of, method_of, open_run, state_of

SPEC = FormatSpec(
    name="nerfstudio",
    title="nerfstudio: a run folder, or step-*.ckpt with config.yml",
    probe="pvdconvert_formats.nerfstudio:probe",
    code="pvdconvert_formats.nerfstudio:Nerfstudio",
    architectures=("ngp", "tensorf", "tensorf-cp", "nerf"),
    suffixes=(".ckpt",),
    can_write=True,
    writes=("nerf",),
    versions="nerfacto, instant-ngp (torch; tcnn since 2022), tensorf (vm, cp), vanilla-nerf; writes vanilla-nerf",
    verified="nerfacto: a run of the program's own code with its oracle; the others: known answers in the tests",
    program="nerfstudio-project/nerfstudio",
    licence="Apache-2.0",
)
CONTRACTED = Box.cube(2.0)
"""Where contraction puts all of space; within -1..1 it changes nothing."""
_IGNORED = re.compile(
    r"(lpips|psnr|ssim|camera_optimizer|proposal_networks|datamanager|collider|renderer\w*|sampler\w*)(\.|$).*"
    r"|device_indicator_param|scene_aabb|occupancy_grid\..*|field\.(direction|position)_encoding\..*"
    r"|field\.(embedding_transient|mlp_transient|mlp_semantics|mlp_pred_normals|field_head\w*)\..*"
    r"|field(_\w+)?\.(direction|position|feature)_encoding\..*"
)
_NEEDED = {
    "nerfacto": r"field\.(aabb|max_res|num_levels|log2_hashmap_size|embedding_appearance\..*|mlp_base(_grid|_mlp)?\..*"
    r"|mlp_head\..*)",
    "tensorf": r"field\.(aabb|(density|color)_encoding\.(plane|line)_coef|B\.weight|mlp_head\.layers\..*"
    r"|field_output_rgb\.net\..*)",
    "vanilla-nerf": r"field_(coarse|fine)\.(mlp_base|mlp_head)\.layers\..*"
    r"|field_(coarse|fine)\.(field_output_density|field_heads\.0)\.net\..*",
}
_NEEDED["instant-ngp"] = _NEEDED["nerfacto"]


def probe(manifest: Manifest) -> Match | None:
    if manifest.kind != "folder" and not manifest.kind.startswith("torch-"):
        return None
    checkpoint = checkpoint_of(manifest)
    if checkpoint is None:
        return None
    method = method_of(state_of(checkpoint.tensors))
    if method is None:
        return Match(0.25, "a nerfstudio pipeline, but of none of nerfacto, instant-ngp, tensorf, vanilla-nerf")
    if method == "splatfacto":
        return Match(0.25, "nerfstudio's splatfacto: Gaussian splats, not a radiance field")
    what = "" if checkpoint is manifest else f" in {checkpoint.path.name}"
    return Match(0.97, f"nerfstudio's {method}: pipeline._model.* and step{what}")


class Nerfstudio(FormatBase):
    """Reads the field that renders; proposal networks and losses are left out, as they do not change it."""

    def read(self, manifest: Manifest, options: ReadOptions) -> Parts:
        checkpoint = checkpoint_of(manifest)
        where = f"{(checkpoint or manifest).path}: nerfstudio"
        state = state_of(checkpoint.tensors) if checkpoint else {}
        method = method_of(state)
        if checkpoint is None or method is None or method == "splatfacto":
            what = "splatfacto holds Gaussian splats" if method else "no checkpoint of a known method"
            raise InputError(f"{where}: {what}", hint="nerfacto, instant-ngp, tensorf and vanilla-nerf are read")
        surplus = [k for k in state if not re.fullmatch(_NEEDED[method], k)]
        for key in surplus:
            if not _IGNORED.fullmatch(key):
                raise InputError(f"{where}: tensor {key!r} has no place in {method}")
        run = open_run(checkpoint, options, where)
        notes = [_left_out(surplus)] if surplus else []
        if options.extra.get("appearance") is not None and method not in ("nerfacto", "instant-ngp"):
            raise InputError(f"{where}: {method} has no appearance embedding", hint="leave out --extra appearance")
        read = {"tensorf": self._tensorf, "vanilla-nerf": self._vanilla}.get(method, self._nerfacto)
        architecture, config, tensors, scene, assumed, more = read(state, run, options, method, where)
        scene = assume(scene, options, assumed if run.world is not None else (*assumed, "world"))
        notes += [*more, *assumption_note(scene)]
        provenance = {"program": "nerfstudio", "method": method, "step": checkpoint.meta.get("step")}
        return Parts(architecture, config, tensors, scene, provenance, tuple(notes))

    def _nerfacto(
        self, state: Mapping[str, LazyTensor], run: Run, options: ReadOptions, method: str, where: str
    ) -> tuple[str, Config, dict[str, LazyTensor], Scene, tuple[str, ...], tuple[str, ...]]:
        acc = method == "nerfacto"
        grid_box, scene_box, notes = _boxes(_aabb(state, where), run, options, acc, where)
        all_of_space = scene_box is CONTRACTED
        average = run.get("use_average_appearance_embedding", True) if acc else False
        shown, said = nerfacto.constants(state, options.extra.get("appearance"), average, where)
        config, tensors = nerfacto.field(state, run, shown, where)
        config |= {"box": [list(grid_box.min), list(grid_box.max)]}
        # instant-ngp's constructor keeps 1; files of before 2024 have no such setting, as it was 1 then.
        config["density_scale"] = run.get("average_init_density", 1.0) if acc else 1.0
        if not config["density_scale"] > 0:
            raise InputError(f"{where}: average_init_density is {config['density_scale']}, not positive")
        notes = (*notes, *said)
        step = None
        if not acc:
            notes = (*notes, *nerfacto.occupancy(state, config, tensors, where))
            step = run.get("render_step_size", 0.0) or _aabb(state, where).diagonal / 1000
        background, assumed = run.background()
        if background is None:
            notes = (*notes, "behind its last sample the program repeats that sample's colour: no background is set")
        near, far = run.span(("near_plane", "far_plane"))
        space = RaySpace("contracted", norm="linf") if all_of_space else RaySpace()
        world = run.world or IDENTITY
        scene = Scene(scene_box, world=world, background=background, near=near, far=far, step=step, ray_space=space)
        return "ngp", config, tensors, scene, assumed, notes

    def _tensorf(
        self, state: Mapping[str, LazyTensor], run: Run, options: ReadOptions, method: str, where: str
    ) -> tuple[str, Config, dict[str, LazyTensor], Scene, tuple[str, ...], tuple[str, ...]]:
        box = _aabb(state, where)
        architecture, config, tensors = other.tensorf(state, box, where)
        background, assumed = run.background()
        near, far = run.span(("near_plane", "far_plane"))
        scene = Scene(box, background=background, near=near, far=far, world=run.world or IDENTITY)
        return architecture, config, tensors, scene, assumed, ()

    def _vanilla(
        self, state: Mapping[str, LazyTensor], run: Run, options: ReadOptions, method: str, where: str
    ) -> tuple[str, Config, dict[str, LazyTensor], Scene, tuple[str, ...], tuple[str, ...]]:
        if run.model.get("enable_temporal_distortion") is True:
            raise InputError(f"{where}: it moves in time (enable_temporal_distortion), which is not supported")
        fine, tensors = other.vanilla(state, "field_fine", "fine", where)
        coarse: Config | None
        coarse, more = other.vanilla(state, "field_coarse", "coarse", where)
        if run.own.get("one_network") is True:  # which stands in both places of what we wrote
            coarse, more = None, {}
        own = run.own.get("box")
        box = options.bounds or (Box.from_json(own) if isinstance(own, dict) else run.box())
        if box is None:
            raise InputError(f"{where}: the box of this data set is in no file", hint="add --bounds (six numbers)")
        background, assumed = run.background()
        near, far = run.span(("near_plane", "far_plane"))
        scene = Scene(box, background=background, near=near, far=far, world=run.world or IDENTITY)
        config = two_networks(fine, coarse, where)
        return "nerf", config, tensors | more, scene, (*assumed, *(() if own else ("box",))), ()

    def limits(self, architecture: str) -> Limits:
        return Limits(writer.FIXED) if architecture == "nerf" else Limits()

    def write(self, parts: Parts, path: Path) -> None:
        torch_zip_writer.write(path, writer.build(parts, f"{path}: nerfstudio"))


def _aabb(state: Mapping[str, LazyTensor], where: str) -> Box:
    low, high = need(state, "field.aabb", (2, 3), where).numpy().tolist()
    try:
        return Box(tuple(low), tuple(high))
    except InputError as error:
        raise InputError(f"{where}: field.aabb: {error}") from error


def _boxes(aabb: Box, run: Run, options: ReadOptions, unbounded: bool, where: str) -> tuple[Box, Box, tuple[str, ...]]:
    """(the grid's box, the scene's box, notes). A contracted scene is unbounded, or cropped where nothing is moved.

    unbounded  the method's samples follow the contraction; instant-ngp's grids of cells lie in the world
    """
    if run.get("disable_scene_contraction", False):
        return aabb, options.bounds or aabb, ()
    if options.bounds is None and unbounded:
        return CONTRACTED, CONTRACTED, ()
    if options.bounds is None or max(abs(v) for v in (*options.bounds.min, *options.bounds.max)) > 1:
        raise InputError(
            f"{where}: its scene is contracted (unbounded): it can be cropped within -1..1 only",
            hint="add --bounds=-1,-1,-1,1,1,1 or a smaller box: density outside of it is dropped",
        )
    return CONTRACTED, options.bounds, ("contracted scene: cropped to --bounds, what lies outside is dropped",)


def _left_out(surplus: list[str]) -> str:
    """One line that says which parts of the model do not change its field."""
    parts = dict.fromkeys(k.split(".")[0] if not k.startswith("field") else ".".join(k.split(".")[:2]) for k in surplus)
    return f"left out, as they do not change the field: {', '.join(parts)}"
