"""args.txt and config.txt of bmild/nerf and its relatives -> a scene (layouts sections 5.1, 5.2). Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping

from pvdconvert.containers import Manifest
from pvdconvert.errors import InputError
from pvdconvert.plugin import ReadOptions
from pvdconvert.scene import Scene
from pvdconvert_formats import _nerf_layers as nerf

FILES = ("config.txt", "args.txt")
"""In the order of authority: args.txt is written by the program and holds the defaults too, so it wins."""
MAX_BYTES = 1 << 18


def read_settings(manifest: Manifest, options: ReadOptions) -> dict[str, str]:
    """``key = value`` lines of --config FILE, or of :data:`FILES` beside the weights; {} if there are none."""
    texts = []
    if options.config is not None:
        try:
            with options.config.open("rb") as file:
                raw = file.read(MAX_BYTES + 1)
            if len(raw) > MAX_BYTES:
                raise InputError(f"{options.config}: more than {MAX_BYTES} bytes: not the settings of a checkpoint")
            texts.append(raw.decode("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{options.config}: cannot be read as text: {error}") from error
    else:
        texts += [manifest.sibling_text(name) for name in FILES if name in manifest.siblings()]
    settings: dict[str, str] = {}
    for line in "\n".join(texts).splitlines():
        key, equals, value = line.partition("=")
        if equals and not key.lstrip().startswith("#"):
            settings[key.strip()] = value.strip()
    return settings


def flag(settings: Mapping[str, str], key: str, default: bool = False) -> bool:
    """A setting that is True or False."""
    return settings.get(key, str(default)).lower() == "true"


def scene_of(settings: Mapping[str, str], options: ReadOptions, where: str) -> tuple[Scene, tuple[str, ...]]:
    """The scene that ``settings`` speak of, and the note on what was assumed.

    Without settings: NeRF-Synthetic, all of it marked as assumed. With them, what is left out has the program's own
    default: LLFF in NDC, black background. Raises InputError where box or distances are in no file.
    """
    kind = settings.get("dataset_type", "llff") if settings else None
    white = flag(settings, "white_bkgd", default=kind is None)
    background = (1.0, 1.0, 1.0) if white else (0.0, 0.0, 0.0)
    if kind == "llff" and not flag(settings, "no_ndc"):
        scene = nerf.ndc_scene(options, background, where)
        assumed: tuple[str, ...] = ("box",) if scene.ray_space.focal else ("box", "ray_space")
    elif kind in ("blender", None):
        scene = nerf.synthetic_scene(background)
        assumed = ("box",) if kind else ("box", "background", "near", "far")
    else:
        if options.bounds is None or options.near is None or options.far is None:
            raise InputError(
                f"{where}: box and distances of dataset_type {kind!r:.40} are in no file",
                hint="add --bounds (six numbers), --near and --far",
            )
        scene = Scene(options.bounds, background=background, near=options.near, far=options.far)
        assumed = ()
    scene = nerf.assume(scene, options, assumed)
    return scene, nerf.assumption_note(scene)
