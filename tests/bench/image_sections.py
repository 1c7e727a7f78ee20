"""What `make bench-image` tells of the runner alone, behind the comparison: text only."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tests.bench.image_soak import SoakResult
from tests.bench.report import table

MOST_SLOPE_KIB = 5.0
"""A picture. What "does not grow" is held to, for a resident size moves by pages and arenas."""


@dataclass(frozen=True, slots=True)
class Section:
    """Something that a module measures in a process of its own, and how it is told."""

    name: str
    title: str
    module: str
    lines: Callable[[Mapping[str, Any]], list[str]]


def profile_lines(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The answer of `profile_image`: a table of shares for each part."""
    said = []
    for part, each in found.items():
        total = sum(each["kinds_s"].values()) + each["unnamed_s"]
        said += [f"A {part}, {each['whole_s']:.2f} s: where its threads' time goes, by Python's profiler.", ""]
        rows = sorted(each["kinds_s"].items(), key=lambda item: -item[1])
        most = ", ".join(list(each["most_unnamed_s"])[:3])
        rows.append((f"the rest ({most})", each["unnamed_s"]))
        said += [*table(["", "share"], [[kind, f"{seconds / total:.1%}"] for kind, seconds in rows]), ""]
    return said[:-1]


def further_lines(found: Mapping[str, Any]) -> list[str]:
    """The answer of `run_image_further`: the step cache, and a decode in strips."""
    cache = found["step_cache"]
    where = f"{cache['pipeline']}, {cache['steps']} steps, {cache['side']}x{cache['side']}"
    said = [f"The step cache on {where}: means over {cache['pictures']} pictures, each against itself without it.", ""]
    rows = [
        [f"{row['threshold']:g}", f"{row['computed']:.1f}", f"{row['time_share']:.2f}", f"{row['mean_apart']:.2f}"]
        for row in cache["rows"]
    ]
    head = ["threshold", "steps computed", "time over that without", "mean difference, 1/255"]
    said += table(head, rows)
    if tiles := found.get("tiles"):
        said += ["", f"The same latents decoded in strips, as with --vae-tile={tiles['tile']}, and whole:", ""]
        said += table(
            ["in strips, s", "whole, s", "mean difference, 1/255", "largest"],
            [[f"{tiles[name]:.2f}" for name in ("tiled_s", "whole_s", "mean_apart", "most_apart")]],
        )
    return said


def soak_lines(result: SoakResult) -> list[str]:
    """Memory and health over many pictures."""
    said = ["## Many pictures on end", ""]
    if result.failure:
        return [*said, f"failed: {result.failure}", ""]
    figures = {name: value for name, value in result.figures().items() if value is not None}
    said.append(
        f"{result.requests} pictures one after another from a spawned runner on {result.pipeline}, the first quarter a "
        f"warm-up; a health probe every 10 ms meanwhile."
    )
    said.append("")
    if "slope_kib" in figures:
        slope, error = figures["slope_kib"], figures["slope_error_kib"]
        word = "met" if slope <= MOST_SLOPE_KIB else "**not met**"
        said.append(f"- RSS grew by {slope:.1f} ± {error:.1f} KiB a picture (goal <= {MOST_SLOPE_KIB:g}: {word})")
    if "rss_mib" in figures:
        said.append(f"- RSS at the end: {figures['rss_mib']:.0f} MiB")
    if "health_p50_ms" in figures:
        p50, p99 = figures["health_p50_ms"], figures["health_p99_ms"]
        said.append(f"- health, {len(result.health_s)} probes: p50 {p50:.1f} ms, p99 {p99:.1f} ms")
    if "request_p50_s" in figures:
        said.append(f"- a picture: median {figures['request_p50_s']:.2f} s")
    return [*said, ""]


SECTIONS = (
    Section("profile", "Where the time goes", "profile_image", profile_lines),
    Section("further", "Step cache and strips", "run_image_further", further_lines),
)
