"""Asking the teacher once: fills the store that every later step replays (pvd.md 8)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pvdconvert import stopwatch
from pvdconvert.cameras import Camera
from pvdconvert.distill.scratch import IN_MEMORY, Scratch
from pvdconvert.distill.seen import Seen
from pvdconvert.distill.store import Store
from pvdconvert.distill.views import draw_rays
from pvdconvert.errors import RequestError
from pvdconvert.field import RadianceField
from pvdconvert.progress import Progress
from pvdconvert.render.contracted import norm
from pvdconvert.render.occupancy import CHUNK, Occupancy
from pvdconvert.render.occupy import dilate, split, tight
from pvdconvert.render.trace import CANDIDATES, Trace, trace
from pvdconvert.scene import Box, RaySpace, Scene

if TYPE_CHECKING:
    from pvdconvert.distill.parallel import Ranks

BATCH = 1 << 14
"""Rays drawn at a time; the batch number is part of their seed, so any number of batches starts with the same rays."""

VISIBLE = 1e-3
"""A sample whose compositing weight stays below this on every ray is not seen."""

SIDES = 6
"""Directions in which the colour of a visible sample is asked beside its own ray's. With one direction a point,
students learn the rays by heart: 37.7 dB on the rays of the store, 25.6 dB on others (lego, tensorf)."""

AROUND, AHEAD = (0.1, 1.5), (0.02, 0.2)
"""How far those directions spread about the ray's own, least and most: a forward-facing scene was never seen, and its
colours mean nothing, from beside; nor was what lies far out in an unbounded one."""

NEAR = 0.2
"""How far they spread about directions from which a place was seen, as a share of the most. On lego at equal steps, dB
of a hash grid on four test views: 32.49 from around the ray alone; 32.63, 32.90, 32.66 with shares 1/15, 1/5, 1/3."""

SIDED = 0.02
"""Compositing weight from which a sample is asked from several sides."""

FREE_SHARE = 0.1
"""Points anywhere in occupied space, as a share of the samples on rays."""

FEWEST = 1 << 16
"""Free points in and around the box for a student without a mask, at least."""


def label(
    teacher: RadianceField,
    scene: Scene,
    occupancy: Occupancy,
    *,
    step: float,
    seconds: float,
    max_samples: int,
    batches: int | None = None,
    first: int = 0,
    seed: int = 0,
    cameras: Sequence[Camera] = (),
    progress: Progress,
    device: torch.device,
    ranks: Ranks | None = None,
    scratch: Scratch = IN_MEMORY,
    candidates: int = CANDIDATES,
    seen: Seen | None = None,
) -> tuple[Store, int]:
    """Trace pseudo-view rays through ``teacher`` until ``seconds`` or ``max_samples`` are spent, or for ``batches``.

    ``first`` is the number of the first batch: a second call goes on where another ended.
    ``ranks`` divides the batches among processes; each gets the whole store. ``scratch`` is where it lies;
    ``candidates`` bounds the lattice points that are held at once while tracing; ``seen`` knows from where places show.
    Returns the store and the number of batches asked: the same number and seed give the same store, bit for bit.
    """
    start = stopwatch.now()
    box = occupancy.box
    parts: list[tuple[Tensor, ...]] = []
    samples, done = 0, 0
    rank, size = (0, 1) if ranks is None else (ranks.rank, ranks.size)
    while True:
        if batches is None or done + rank < batches:
            number = seed * 1_000_003 + first + done + rank
            o, d = draw_rays(scene, box, occupancy, BATCH, number, cameras)
            generator = torch.Generator().manual_seed(number)
            jitter = torch.rand(BATCH, generator=generator).to(device)
            got = trace(
                teacher,
                o.to(device),
                d.to(device),
                occupancy,
                step=step,
                near=scene.clip[0],
                far=scene.clip[1],
                backdrop=scene.backdrop,
                jitter=jitter,
                ray_space=scene.ray_space,
                candidates=candidates,
            )
            counts = got.offsets[1:] - got.offsets[:-1]
            hit = counts > 0
            answers = (
                *_from_sides(teacher, got, generator, scene.ray_space, seen),
                *(got.x, got.t, got.dt, got.sigma, got.weight, got.rgb, got.colored),
                *(got.d[hit], counts[hit], got.ray_rgb[hit], got.ray_opacity[hit], got.ray_depth[hit]),
            )
            parts.append(tuple(scratch.hold(v) for v in answers))
            samples += len(got.x)
        done = done + size if batches is None else min(batches, done + size)
        spent, each = stopwatch.now() - start, done / size
        progress.advance(spent, rays=float(done * BATCH), samples=float(samples * size))
        if batches is not None:
            if done >= batches:
                break
            continue
        enough = size * (samples + samples / each) > max_samples or spent + 0.7 * spent / each > seconds
        if enough if ranks is None else ranks.most(enough)[0]:
            break
    if ranks is not None:
        parts = ranks.gather(parts, device)
    before = 0
    for part in parts:
        part[0].add_(before)
        before += len(part[3])
    columns = [list(column) for column in zip(*parts)]
    parts.clear()  # each column's parts go when they are joined: memory for one store and a column, not for two
    many, many_d, many_rgb, x, t, dt, sigma, weight, rgb, colored, d, counts, ray_rgb, ray_opacity, ray_depth = (
        scratch.cat(columns.pop(0)) for _ in range(len(columns))
    )
    if not bool(torch.isfinite(sigma).all() & torch.isfinite(rgb).all()):
        raise RequestError("the teacher answers values that are not numbers", hint="its weights are damaged")
    if not bool((ray_opacity > 0.02).any()):
        raise RequestError("no view sees any density", hint="is the box right? give --bounds x0,y0,z0,x1,y1,z1")
    offsets = torch.zeros(len(counts) + 1, dtype=torch.int64, device=device)
    torch.cumsum(counts, 0, out=offsets[1:])
    store = Store(
        scene=scene,
        occupancy=occupancy,
        step=step,
        x=x,
        t=t,
        dt=dt,
        sigma=sigma,
        weight=weight,
        rgb=rgb,
        colored=colored,
        d=d,
        offsets=offsets,
        ray_rgb=ray_rgb,
        ray_opacity=ray_opacity,
        ray_depth=ray_depth,
        free_x=x[:0],
        free_sigma=sigma[:0],
        many=many,
        many_d=many_d,
        many_rgb=many_rgb,
        teacher=teacher,
    )
    return store, done


@torch.no_grad()
def _from_sides(
    teacher: RadianceField, got: Trace, generator: torch.Generator, space: RaySpace, seen: Seen | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(sample [Q], directions [Q, SIDES, 3], colours): visible samples asked again from where their places were seen,
    or, where that is not known, from around their own direction."""
    chosen = (got.weight > SIDED).nonzero().squeeze(1)
    counts = got.offsets[1:] - got.offsets[:-1]
    ray = torch.repeat_interleave(torch.arange(len(counts), device=chosen.device), counts)
    low, high = AHEAD if space.kind == "ndc" else AROUND
    reach = torch.ones(len(chosen))
    if space.kind == "contracted":
        reach[norm(got.x[chosen], space)[:, 0].cpu() > 1.0] = AHEAD[1] / AROUND[1]
    spread = (torch.rand(len(chosen), SIDES, 1, generator=generator) * (high - low) + low) * reach[:, None, None]
    turned = torch.randn(len(chosen), SIDES, 3, generator=generator) * spread
    d = torch.nn.functional.normalize(got.d[ray[chosen], None] + turned.to(chosen.device), dim=-1)
    if seen is not None:
        others, known = seen.draw(got.x[chosen], SIDES, generator, NEAR * high * reach)
        d = torch.where(known[:, None, None], others, d)
    colors = [
        teacher.color(teacher.encode(got.x[part]), d[where])
        for part, where in zip(
            torch.split(chosen, 1 << 14), torch.split(torch.arange(len(chosen), device=chosen.device), 1 << 14)
        )
    ]
    return chosen, d, torch.cat(colors) if colors else d


def merge(a: Store, b: Store, scratch: Scratch = IN_MEMORY) -> Store:
    """All rays and samples of both; what belongs to the scene is ``a``'s. Empties both: memory holds each once."""
    b.offsets = b.offsets[1:] + a.offsets[-1]
    b.many += len(a)
    joined: dict[str, Any] = {}
    for field in dataclasses.fields(Store):
        value, other = getattr(a, field.name), getattr(b, field.name)
        if isinstance(value, Tensor):
            joined[field.name] = scratch.cat([value, other])
            setattr(a, field.name, value[:0].clone())
            setattr(b, field.name, value[:0].clone())
    return dataclasses.replace(a, **joined)


def latest(store: Store, samples: int) -> Store:
    """The last rays of ``store`` with at most ``samples`` samples, and as large a share of its free points: views."""
    first = min(int(torch.searchsorted(store.offsets, len(store) - samples)), store.rays)
    low = int(store.offsets[first])
    sided = int(torch.searchsorted(store.many, low))
    free = len(store.free_x) - int(len(store.free_x) * (len(store) - low) / max(1, len(store)))
    per_sample = {n: getattr(store, n)[low:] for n in ("x", "t", "dt", "sigma", "weight", "rgb", "colored")}
    per_ray = {n: getattr(store, n)[first:] for n in ("d", "ray_rgb", "ray_opacity", "ray_depth")}
    return dataclasses.replace(
        store,
        **per_sample,
        **per_ray,
        offsets=store.offsets[first:] - low,
        many=store.many[sided:] - low,
        many_d=store.many_d[sided:],
        many_rgb=store.many_rgb[sided:],
        free_x=store.free_x[free:],
        free_sigma=store.free_sigma[free:],
    )


def visible_cells(store: Store, *, factor: int = 2, grow: int = 1) -> Occupancy:
    """The cells that some ray saw: occupancy cut ``factor`` times finer, kept where a weight showed, grown by ``grow``.

    What no camera sees (the inside of solids) is dropped: a student spends nothing on it. Cells of an unbounded scene
    are not cut: from inside, rays are few for all that lies far away, and a cell that none met would be a hole.
    """
    factor = 1 if store.scene.ray_space.kind == "contracted" else factor
    fine = split(store.occupancy, factor)
    grid = torch.zeros_like(fine.grid)
    shape = torch.tensor(fine.grid.shape, device=grid.device)
    for x, weight in zip(torch.split(store.x, CHUNK), torch.split(store.weight, CHUNK)):
        i = fine.index(x[weight > VISIBLE])
        i = i[((i >= 0) & (i < shape)).all(-1)]
        grid[i[:, 0], i[:, 1], i[:, 2]] = 1
    return tight(Occupancy(fine.origin, fine.cell, dilate(grid, grow) & fine.grid))


@torch.no_grad()
def focus(
    store: Store, cells: Occupancy, seed: int, around: Box | None = None, scratch: Scratch | None = None
) -> Store:
    """``store`` without the samples outside of ``cells``, where the student is exactly zero, and with free points.

    around   for a student without a mask, which is zero nowhere by itself: as many free points again in this box grown
             by half, with the teacher's density where it is occupied and 0 elsewhere
    scratch  where it lies; with it ``store`` is emptied on the way, so that memory holds each sample once
    """
    keep = cells.contains(store.x)
    running = torch.cumsum(keep, 0)
    kept = int(running[-1]) if len(running) else 0
    sided = keep[store.many]
    counts = torch.diff(torch.where(store.offsets > 0, running[store.offsets - 1], 0))
    rays = counts > 0
    offsets = torch.zeros(int(rays.sum()) + 1, dtype=torch.int64, device=store.x.device)
    torch.cumsum(counts[rays], 0, out=offsets[1:])
    many = running[store.many[sided]] - 1
    del running
    generator = torch.Generator().manual_seed(seed)
    count = int(FREE_SHARE * kept)
    index = cells.grid.nonzero()
    chosen = torch.randint(len(index), (count,), generator=generator).to(index.device)
    jitter = torch.rand(count, 3, generator=generator).to(index.device)
    free_x = cells.origin + (index[chosen] + jitter) * cells.cell
    if around is not None:
        low, size = (torch.tensor(v, device=free_x.device) for v in (around.min, around.size))
        anywhere = torch.rand(max(count, FEWEST), 3, generator=generator).to(free_x.device)
        free_x = torch.cat([free_x, low - size / 4 + 1.5 * size * anywhere])

    def take(name: str, rows: Tensor) -> Tensor:
        value: Tensor = getattr(store, name)
        if scratch is None:
            return value[rows]
        setattr(store, name, value[:0].clone())
        return scratch.select(value, rows)

    return Store(
        scene=store.scene,
        occupancy=cells,
        step=store.step,
        free_x=free_x,
        free_sigma=store.ask_density(free_x),
        x=take("x", keep),
        t=take("t", keep),
        dt=take("dt", keep),
        sigma=take("sigma", keep),
        weight=take("weight", keep),
        rgb=take("rgb", keep),
        colored=take("colored", keep),
        d=take("d", rays),
        offsets=offsets,
        ray_rgb=take("ray_rgb", rays),
        ray_opacity=take("ray_opacity", rays),
        ray_depth=take("ray_depth", rays),
        many=many,
        many_d=take("many_d", sided),
        many_rgb=take("many_rgb", sided),
        whole_space=around is not None,
        teacher=store.teacher,
    )
