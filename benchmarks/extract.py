"""How fast `karmma extract` is, as ratios: python benchmarks/extract.py [--quick].

In one run, interleaved, on generated H.264 clips with sound (or --video FILE ...):

    extract   the whole pipeline, from files to a committed store, after its start-up (to be
              compared in seconds; in CPU seconds where other work shares the machine)
    bare      the forward passes alone, on tensors that are there, in the same batches; with
              engine torch, whatever the row's own engine (--engine)
    loop      what a script does: open the file, read, one clip at a time, float32, save an .npy

Then what the rule for computing loses against the fastest memory format and batch size, of every
network; what each way of computing gains and how far it strays from plain float32; and the peak
memory over a small and a ten times larger data set. --loss prints the losses alone, --bars the
ratios to the bare passes and how far an engine strays alone: a few minutes of an idle machine.
Random weights: speed does not depend on them, deviations do a little (--weights DEFAULT after
`karmma backbones fetch`).
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import torch

from karmma_pipeline import config, jobs
from karmma_pipeline.data.manifest import Clip, read_manifest
from karmma_pipeline.data.sources import FileSource
from karmma_pipeline.extraction.decode.frame_selection import sample_times
from karmma_pipeline.extraction.decode.worker import decode_clips
from karmma_pipeline.extraction.inference import openvino_engine
from karmma_pipeline.extraction.inference.batching import (
    ForwardWorkers,
    collate,
    one_thread,
    plan_batches,
)
from karmma_pipeline.extraction.inference.networks import Networks, by_rule, configure, example
from karmma_pipeline.extraction.inference.runner import ComputeConfig, Network
from karmma_pipeline.extraction.media.media_file import MediaFile
from karmma_pipeline.extraction.pipeline import extract
from karmma_pipeline.extraction.progress import STARTING
from karmma_pipeline.extraction.recipe import ExtractRecipe
from karmma_pipeline.extraction.types import Batch, DecodeSettings, input_spec
from karmma_pipeline.models.backbones import ARCHITECTURES, Backbone, BackboneChoice
from karmma_pipeline.models.device import device_name, pick_device

Sets = dict[str, dict[str, dict[str, Any]]]
CLIP_S, FILE_S, FPS = 2.0, 16.0, 30


def main() -> None:
    """Run the benchmark and print its tables."""
    arguments = parse()
    device = pick_device(arguments.device)
    torch.set_num_threads(1)
    if arguments.loss:
        print_losses(device, arguments)
        return
    print(f"{device_name(device)}, {jobs.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}\n")
    with tempfile.TemporaryDirectory(prefix="karmma-benchmark-") as name:
        folder = Path(name)
        manifest = write_manifest(folder, arguments)
        print(
            "| case, engine | extract : bare | the same in CPU seconds | loop : extract | s/clip "
            "| decoding | bound | start-up |"
        )
        print("|---|---:|---:|---:|---:|---:|---|---:|")
        for case, sets in cases(arguments, folder).items():
            for row in compare(folder, manifest, case, sets, arguments):
                print(row, flush=True)
        if not arguments.bars:
            print_losses(device, arguments)
        print("\n| backbone | way | time : float32 | least cosine of a token | largest error |")
        print("|---|---|---:|---:|---:|")
        for choice in singles(arguments).values():
            for row in deviations(manifest, choice, device, arguments):
                print(row, flush=True)
        if not arguments.no_memory and not arguments.bars:
            print(f"\n{peak_memory(folder, arguments)}")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small inputs, few clips: a minute")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--engine", nargs="*", choices=("torch", "openvino"), help="of networks")
    parser.add_argument("--weights", default="random:0")
    parser.add_argument("--clips", type=int, help="clips of a run; default 24, quick 8")
    parser.add_argument("--repeat", type=int, help="rounds; default 3, quick 2")
    parser.add_argument("--case", nargs="*", help="only these cases; any video network")
    parser.add_argument("--video", nargs="*", type=Path, default=[], help="files of your own")
    parser.add_argument("--no-memory", action="store_true", help="leave the memory test out")
    parser.add_argument("--compile", action="store_true", help="try torch.compile, too")
    parser.add_argument("--precisions", action="store_true", help="try bfloat16 and tf32, too")
    parser.add_argument("--bars", action="store_true", help="extract : bare, nothing else of it")
    parser.add_argument("--loss", action="store_true", help="what the rule loses, nothing else")
    arguments = parser.parse_args()
    arguments.clips = arguments.clips or (8 if arguments.quick else 24)
    arguments.repeat = arguments.repeat or (2 if arguments.quick else 3)
    both = openvino_engine.is_installed() and pick_device(arguments.device).type == "cpu"
    arguments.engine = arguments.engine or (["torch", "openvino"] if both else ["torch"])
    return arguments


def singles(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return the networks that are looked at one by one."""
    small = {"frames": 8, "size": 64} if arguments.quick else {}
    rows: dict[str, dict[str, Any]] = {
        "swin3d_t": {"frames": 32},
        "s3d": {"frames": 16},
        "r2plus1d_18": {"frames": 16},
    }
    others = [n for n in arguments.case or () if n in ARCHITECTURES and n not in rows]
    rows |= {name: {} for name in others if ARCHITECTURES[name].kind == "video"}
    return {
        name: {"name": name, "weights": arguments.weights, **row, **small}
        for name, row in rows.items()
        if not arguments.case or name in arguments.case
    }


def named(folder: Path, arguments: argparse.Namespace) -> dict[str, dict[str, dict[str, Any]]]:
    """Return networks of the libraries that are installed, in real sizes, with random weights."""
    quick, rows = arguments.quick, {}
    if find_spec("timm"):
        vit = {"name": "timm:vit_small_patch16_224", "frames": 2 if quick else 8}
        rows["timm:vit_small_patch16_224"] = {"rgb": vit}
    if find_spec("transformers"):
        import transformers

        layers = {"num_hidden_layers": 2} if quick else {}
        small = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, **layers}
        of_library = {
            "VideoMAE-S": ("rgb", transformers.VideoMAEConfig(**small), "VideoMAEImageProcessor"),
            "AST": ("audio", transformers.ASTConfig(**layers), "ASTFeatureExtractor"),
        }
        for case, (modality, config_of, processor) in of_library.items():
            config_of.save_pretrained(folder / case)
            getattr(transformers, processor)().save_pretrained(folder / case)
            rows[case] = {modality: {"name": f"hf:{folder / case}"}}
    return {
        case: {
            modality: {"weights": arguments.weights, **choice} for modality, choice in row.items()
        }
        for case, row in rows.items()
    }


def cases(arguments: argparse.Namespace, folder: Path) -> dict[str, Sets]:
    """Return the backbone sets that are extracted."""
    found: dict[str, Sets] = {
        name: {"one": {"rgb": choice}} for name, choice in singles(arguments).items()
    }
    everything = singles(argparse.Namespace(**{**vars(arguments), "case": None}))
    image = [64, 96] if arguments.quick else [128, 256]
    sound = {"name": "efficientnet_b0", "weights": arguments.weights, "image": image}
    s3d = everything["s3d"]
    found["rgb+flow+audio (s3d, s3d, efficientnet_b0)"] = {
        "one": {"rgb": s3d, "flow": {**s3d, "weights": "random:1"}, "audio": sound}
    }
    found["two sets (swin3d_t, s3d)"] = {
        "teacher": {"rgb": everything["swin3d_t"]},
        "student": {"rgb": s3d},
    }
    found |= {case: {"one": choices} for case, choices in named(folder, arguments).items()}
    wanted = arguments.case
    return {k: v for k, v in found.items() if not wanted or any(k.startswith(w) for w in wanted)}


def write_manifest(folder: Path, arguments: argparse.Namespace) -> Path:
    """Write the videos, unless some were given, and their clips."""
    videos = [path.absolute() for path in arguments.video]
    if not videos:
        count = -(-arguments.clips // int(FILE_S / CLIP_S))
        videos = [write_video(folder / f"v{i}.mp4", i, FILE_S) for i in range(count)]
    rows = []
    for path in videos:
        count = int(MediaFile(path).stop_s / CLIP_S)
        rows += [f"{path},{i * CLIP_S},{(i + 1) * CLIP_S}" for i in range(count)]
    return write_rows(folder / "manifest.csv", rows[: arguments.clips])


def write_rows(path: Path, rows: Sequence[str]) -> Path:
    """Write a manifest: file, start and stop of each clip."""
    lines = [f"c{i},{row},v{i % 3},train" for i, row in enumerate(rows)]
    path.write_text("\n".join(["clip_id,video,start,stop,verb,split", *lines]) + "\n")
    return path


def write_video(path: Path, seed: int, seconds: float, size: tuple[int, int] = (854, 480)) -> Path:
    """Write H.264 and AAC: a texture that moves under a camera's grain."""
    rng, (w, h) = np.random.default_rng(seed), size
    noise = rng.integers(0, 256, (h // 8, w // 4, 3), np.uint8)
    texture = cv2.resize(noise, (2 * w, h), interpolation=cv2.INTER_CUBIC)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = w, h, "yuv420p"
        stream.options = {"preset": "veryfast"}
        track = container.add_stream("aac", rate=24_000, layout="mono")
        for number in range(round(seconds * FPS)):
            at = 3 * number % w
            picture = cv2.add(texture[:, at : at + w], rng.integers(0, 12, (h, w, 3), np.uint8))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
        wave = rng.normal(0, 0.1, (1, round(seconds * 24_000))).astype(np.float32)
        sound = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
        sound.sample_rate = 24_000
        container.mux(track.encode(sound))
        container.mux(track.encode())
    return path


def make_recipe(manifest: Path, out: Path, sets: Sets, device: str, **more: Any) -> ExtractRecipe:
    """Build a recipe in default settings."""
    tree = {"manifest": str(manifest), "out": str(out), "sets": sets, "device": device, **more}
    return config.build(ExtractRecipe, tree, "benchmark")


def compare(
    folder: Path, manifest: Path, case: str, sets: Sets, arguments: argparse.Namespace
) -> Iterator[str]:
    """Time the three against one another and yield a row of the table for each engine."""
    recipes = {
        engine: make_recipe(manifest, folder / "out", with_engine(sets, engine), arguments.device)
        for engine in arguments.engine
    }
    recipe = make_recipe(manifest, folder / "out", sets, arguments.device)
    networks = Networks(recipe)
    with one_thread(networks.device):
        configure(networks, {}, lambda line: print(f"  {line}", file=sys.stderr))
    clips = read_manifest(manifest).clips
    batches = list(preload(networks, recipe, clips))
    figures: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    bounds = {}
    for _ in range(arguments.repeat):
        reports = {}
        for engine, of_engine in recipes.items():
            shutil.rmtree(recipe.out, ignore_errors=True)
            reports[engine] = extract(of_engine)
        workers = max(report.forward_workers for report in reports.values())
        bare, bare_cpu = time_bare(networks, batches, workers)
        few = clips[: max(1, len(clips) // 4)]
        loop = float("nan") if arguments.bars else time_loop(recipe, few, folder)
        for engine, report in reports.items():
            one, cpu = report.total_s / report.clips, report.cpu_s + report.decode_s
            ratios = (one / bare * len(clips), cpu / bare_cpu, loop / one)
            start = report.seconds[STARTING]
            figures[engine].append((*ratios, one, report.decode_s / cpu, start))
            bounds[engine] = report.bound
    for engine, rounds in figures.items():
        bare, cpu, loop, one, decoding, start = map(statistics.median, zip(*rounds, strict=True))
        yield (
            f"| {case}, {engine} | {bare:.2f} | {cpu:.2f} | {loop:.2f} | {one:.3f} "
            f"| {decoding:.0%} | {bounds[engine]} | {start:.1f} s |"
        )


def with_engine(sets: Sets, engine: str) -> Sets:
    """Return sets whose networks an engine computes."""
    return {
        name: {modality: {**choice, "engine": engine} for modality, choice in choices.items()}
        for name, choices in sets.items()
    }


def preload(networks: Networks, recipe: ExtractRecipe, clips: Sequence[Clip]) -> Iterator[Batch]:
    """Decode all batches."""
    settings, pin = DecodeSettings.of(recipe), networks.device.type == "cuda"
    for plan in plan_batches(0, clips, list(recipe.sets), networks.batch_size, range(len(clips))):
        yield collate(plan, decode_clips(list(plan.clips), settings), pin)


def time_bare(networks: Networks, batches: Sequence[Batch], workers: int) -> tuple[float, float]:
    """Return seconds and CPU seconds of the forward passes alone, in the fastest of three ways.

    One pass at a time on one thread, on all CPUs, or as many passes at once as the pipeline
    has: on a machine with other work the threads of a pass wait for one another. The CPU
    seconds are those of one thread, which does not wait.
    """
    seconds, cpu = [], 0.0
    for count in sorted({1, jobs.cpu_count()}, reverse=True):
        torch.set_num_threads(count)
        networks.compute(batches[0]).wait()
        started, cpu = time.perf_counter(), time.process_time()
        for computed in [networks.compute(batch) for batch in batches]:
            computed.wait()
        seconds.append(time.perf_counter() - started)
        cpu = time.process_time() - cpu
    started = time.perf_counter()
    with ForwardWorkers(networks, workers) as several:
        for batch in batches:
            several.put(batch)
        while len(several):
            several.take().wait()
    seconds.append(time.perf_counter() - started)
    return min(seconds), cpu


def time_loop(recipe: ExtractRecipe, clips: Sequence[Clip], folder: Path) -> float:
    """Return the seconds per clip of a plain script, one network after the other."""
    torch.set_num_threads(jobs.cpu_count())
    device = pick_device(recipe.device)
    total = 0.0
    for choices in recipe.sets.values():
        for modality, choice in choices.items():
            backbone = Backbone(choice).to(device)
            started = time.perf_counter()
            for clip in clips:
                if modality == "rgb":
                    array = read_frames(clip, choice, recipe)
                else:
                    settings = DecodeSettings(
                        recipe.sampling, recipe.flow, recipe.audio, (input_spec(modality, choice),)
                    )
                    (array,) = decode_clips([clip], settings)[0].arrays.values()
                with torch.no_grad():
                    x = backbone.prepare(torch.from_numpy(array)[None].to(device))
                    np.save(folder / "tokens.npy", backbone(x)[0].cpu().numpy())
            total += time.perf_counter() - started
    return total / len(clips)


def read_frames(clip: Clip, choice: BackboneChoice, recipe: ExtractRecipe) -> Any:
    """Open the file and read the frames of one clip."""
    source = clip.media["rgb"]
    assert isinstance(source, FileSource)  # noqa: S101
    stop_s = clip.start_s + CLIP_S if clip.stop_s is None else clip.stop_s
    times = sample_times(recipe.sampling, clip.start_s, stop_s, choice.frame_count)
    frames, _ = MediaFile(source.path).frames(times)
    return choice.transform.apply(frames)


def deviations(
    manifest: Path, tree: dict[str, Any], device: torch.device, arguments: argparse.Namespace
) -> Iterator[str]:
    """Yield a row for each way of computing: its time and how far it is from plain float32."""
    torch.set_num_threads(1)
    choice = config.build(BackboneChoice, tree, "benchmark")
    recipe = make_recipe(manifest, Path("none"), {"one": {"rgb": tree}}, arguments.device)
    decoded = decode_clips(list(read_manifest(manifest).clips[:2]), DecodeSettings.of(recipe))
    clips = torch.from_numpy(np.stack([clip.arrays[input_spec("rgb", choice)] for clip in decoded]))
    seconds, tokens = plain_pass(Backbone(choice).to(device), clips.to(device))
    network = Network(Backbone(choice), device, ComputeConfig())
    folded = "norms folded in, oneDNN" if device.type == "cpu" else "norms folded in"
    ways = {folded: ComputeConfig(), "channels_last": ComputeConfig(memory_format="channels_last")}
    if arguments.bars:
        ways = {}
    if arguments.precisions:  # bfloat16 is 22 to 33 times slower on a CPU that lacks it
        ways["bfloat16"] = ComputeConfig(precision="bfloat16")
        ways["bfloat16, channels_last"] = ComputeConfig(
            precision="bfloat16", memory_format="channels_last"
        )
        if device.type == "cuda":
            ways["tf32"] = ComputeConfig(precision="tf32")
    if arguments.compile:
        ways["compile"] = ComputeConfig(compile=True)
    for way, one in ways.items():
        network.use(one.model_copy(update={"batch_size": len(clips)}))
        yield deviation(network, way, clips, seconds, tokens)
    if "openvino" in arguments.engine:
        converted = choice.model_copy(update={"engine": "openvino"})
        network = Network(Backbone(converted), device, ComputeConfig())
        yield deviation(network, "openvino", clips, seconds, tokens)


def deviation(
    network: Network, way: str, clips: torch.Tensor, seconds: float, tokens: torch.Tensor
) -> str:
    """Return a row: a way's time per clip, and how far its tokens are, from plain float32's."""
    network.tokens(clips[:1])  # what happens only once
    passes = [timed_pass(network, clips) for _ in range(4)]
    found, ratio = passes[0][0], min(s for _, s in passes) / len(clips) / seconds
    error = (found - tokens).abs().max().item()
    name = network.backbone.choice.name
    return f"| {name} | {way} | {ratio:.2f} | {cosine(found, tokens):.7f} | {error:.2e} |"


def cosine(tokens: torch.Tensor, plain: torch.Tensor) -> float:
    """Return the smallest cosine of a token to its float32 self; those near zero have none."""
    norms = plain.double().norm(dim=-1)
    cosines = torch.cosine_similarity(tokens.double(), plain.double(), dim=-1)
    return cosines[norms > 0.01 * norms.mean()].min().item()


def timed_pass(network: Network, clips: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Run a pass; on a CPU, where it has one thread, the work of others is not counted."""
    clock = time.thread_time if network.device.type == "cpu" else time.perf_counter
    started = clock()
    tokens = network.tokens(clips).cpu()  # the copy waits for a GPU
    return tokens, clock() - started


def print_losses(device: torch.device, arguments: argparse.Namespace) -> None:
    """Print what the rule loses, of every network that is shipped."""
    print("\n| backbone | clip | by the rule | fastest | time : fastest |\n|---|---|---|---|---:|")
    for name, architecture in ARCHITECTURES.items():
        if architecture.weights is None or (arguments.case and name not in arguments.case):
            continue
        tree: dict[str, Any] = {"name": name, "weights": arguments.weights}
        if architecture.kind == "image":
            tree["image"] = [64, 96] if arguments.quick else [128, 256]
        elif not name.startswith("mvit"):  # those have one size
            tree |= {"frames": 8, "size": 64} if arguments.quick else {"frames": 16}
        print(loss(config.build(BackboneChoice, tree, "benchmark"), device, arguments), flush=True)


def loss(choice: BackboneChoice, device: torch.device, arguments: argparse.Namespace) -> str:
    """Return a row: a clip's time as the rule computes against the fastest way in float32."""
    spec = input_spec("audio" if choice.architecture.kind == "image" else "rgb", choice)
    network = Network(Backbone(choice), device, ComputeConfig())
    tree: Sets = {"one": {"rgb": choice.model_dump(mode="json")}}
    chosen = by_rule(network, spec, make_recipe(Path("none"), Path("none"), tree, str(device)))
    network.use(chosen)
    slow = timed_pass(network, example(spec, 1))[1] > 0.25  # then larger batches gain nothing
    sizes = {1, 2, chosen.batch_size} | (set() if slow else {4, 8, 16})
    ways = [
        ComputeConfig(memory_format=form, batch_size=size)
        for form in ("contiguous", "channels_last")
        for size in sorted(sizes)
    ]
    seconds = dict.fromkeys(ways, float("inf"))
    for _ in range(arguments.repeat + 1):  # in turn, so that a busy machine slows all alike
        for way in ways:
            network.use(way)
            passed = timed_pass(network, example(spec, way.batch_size))[1] / way.batch_size
            seconds[way] = min(seconds[way], passed)
    fastest = min(ways, key=lambda way: seconds[way])
    mine = seconds[chosen.model_copy(update={"chosen": fastest.chosen})] / seconds[fastest]
    said = [f"{way.memory_format}, batch {way.batch_size}" for way in (chosen, fastest)]
    shape = "x".join(str(n) for n in example(spec, 1).shape[1:])
    return f"| {choice.name} | {shape} | {said[0]} | {said[1]} | {mine:.2f} |"


def plain_pass(backbone: Backbone, clips: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Return the shortest seconds per clip of PyTorch as it is, and the tokens."""
    clock = time.thread_time if clips.device.type == "cpu" else time.perf_counter  # as `timed_pass`
    seconds = []
    for _ in range(4):
        started = clock()
        with torch.inference_mode():
            tokens = backbone(backbone.prepare(clips)).float().cpu()
        seconds.append(clock() - started)
    return min(seconds) / len(clips), tokens


def peak_memory(folder: Path, arguments: argparse.Namespace) -> str:
    """Extract few clips and ten times as many, each in a process of its own."""
    few = 20 if arguments.quick else 200
    video = write_video(folder / "small.mp4", 0, 8, (160, 96))
    tiny = {"name": "s3d", "weights": "random:0", "frames": 16, "size": 64}
    peaks = []
    for count in (few, 10 * few):
        rows = [f"{video},{i % 7},{i % 7 + 1}" for i in range(count)]
        manifest = write_rows(folder / f"{count}.csv", rows)
        out = folder / f"out{count}"
        recipe = make_recipe(manifest, out, {"one": {"rgb": tiny}}, arguments.device, batch_size=8)
        config.save(recipe, folder / "memory.yaml")
        command = [sys.executable, "-m", "karmma_pipeline.cli", "extract"]
        subprocess.run([*command, str(folder / "memory.yaml")], check=True, capture_output=True)
        peaks.append(config.parse_yaml((out / "extract.json").read_text(), "")["peak_memory_bytes"])
    return (
        f"peak memory: {peaks[0] / 1e6:.0f} MB for {few} clips, {peaks[1] / 1e6:.0f} MB for "
        f"{10 * few}: ratio {peaks[1] / peaks[0]:.2f}"
    )


if __name__ == "__main__":
    main()
