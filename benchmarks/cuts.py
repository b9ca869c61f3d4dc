"""What a cut of a backbone costs: disk, what is left to train, and the precision of each type.

    python benchmarks/cuts.py [NAME ...] [--quick]

Prints the table of docs/cut.md for the networks that are named (default: those of that table), at
the sizes of the paper's recipes or their own. One clip of smooth noise, weights random:0. The
prefix runs as in an extraction, its activations are rounded as a store rounds them, and what the
suffix makes of them is compared with the tokens of the whole network in plain float32: the largest
error of float32 activations, and the least cosine of a token of the other types.
"""

import argparse
from collections.abc import Iterator, Mapping

import torch
from torch.utils.flop_counter import FlopCounterMode

from extract import cosine
from karmma_pipeline.extraction.inference.runner import ComputeConfig, Network
from karmma_pipeline.extraction.types import stored_as
from karmma_pipeline.models.backbones import ARCHITECTURES, Backbone, BackboneChoice
from karmma_pipeline.models.backbones.suffix import Suffix
from karmma_pipeline.store.spec import Dtype, ModalitySpec

SIZES: Mapping[str, Mapping[str, object]] = {
    "swin3d_t": {"frames": 32, "tokens": (12, 5, 5)},
    "s3d": {"frames": 16},
    "r2plus1d_18": {"frames": 16},
    "efficientnet_b0": {},
}
DTYPES: tuple[Dtype, ...] = ("float32", "float16", "bfloat16", "int8")
HEADER = "| network | cut | stored, float16 | suffix: parameters, GFLOPs | largest error | "
COSINES = "float16 | bfloat16 | int8 |"


def whole(name: str, *, quick: bool) -> BackboneChoice:
    """Return a network without a cut, at the size that the table states."""
    if ARCHITECTURES[name].kind == "image":
        size: Mapping[str, object] = {"image": (64, 96) if quick else (342, 715)}
    elif quick and not ARCHITECTURES[name].fixed:
        size = {"frames": 16, "size": 64}
    else:
        size = SIZES.get(name, {})
    return BackboneChoice.model_validate({"name": name, "weights": "random:0", **size})


def smooth_noise(choice: BackboneChoice) -> torch.Tensor:
    """Return a clip as the decoder gives it: blobs of 32 px and 8 frames, full contrast."""
    generator = torch.Generator().manual_seed(0)
    *frames, height, width = choice.input_shape[1:]
    coarse = [max(2, t // 8) for t in frames] + [max(2, side // 32) for side in (height, width)]
    noise = torch.nn.functional.interpolate(
        torch.rand(1, 3, *coarse, generator=generator),
        (*frames, height, width),
        mode="trilinear" if frames else "bilinear",
    )
    if choice.architecture.kind == "image":
        return 4 * noise[:, 0] - 2  # a standardised spectrogram
    return (255 * noise).byte().transpose(1, 2)


@torch.inference_mode()
def rows(choice: BackboneChoice) -> Iterator[str]:
    """Yield a row of the table for each cut before a stage."""
    clip, plain = smooth_noise(choice), Backbone(choice)
    tokens, weights = plain(plain.prepare(clip)), plain.net.state_dict()
    for cut in choice.cuts[1:]:
        one = choice.cut_at(cut)
        stored = Network(Backbone(one), torch.device("cpu"), ComputeConfig()).tokens(clip)
        suffix = Suffix(one)
        suffix.net.load_state_dict({key: weights[key] for key in suffix.net.state_dict()})
        specs = {dtype: ModalitySpec(**stored_as("rgb", one, dtype)) for dtype in DTYPES}
        with FlopCounterMode(display=False) as counter:
            found = suffix(rounded(specs["float32"], stored))
        error = f"{float((found - tokens).abs().max()):.1e}"
        cells = [f"{specs['float16'].clip_bytes / 1e6:.2f} MB", trained(suffix, counter), error]
        made = (suffix(rounded(specs[dtype], stored)) for dtype in DTYPES[1:])
        cells += [f"{cosine(of, tokens):.6f}" for of in made]
        yield f"| {choice.name} | {cut} | {' | '.join(cells)} |"


def rounded(spec: ModalitySpec, stored: torch.Tensor) -> torch.Tensor:
    """Return activations as they come back from a store."""
    return torch.from_numpy(spec.decode(spec.encode(stored[0].numpy())))[None]


def trained(suffix: Suffix, counter: FlopCounterMode) -> str:
    """Return parameters and GFLOPs of a suffix."""
    parameters = sum(p.numel() for p in suffix.parameters())
    return f"{parameters / 1e6:.2f} M, {counter.get_total_flops() / 1e9:.1f}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=[*SIZES])
    parser.add_argument("--quick", action="store_true", help="small inputs: shows that it works")
    arguments = parser.parse_args()
    print(f"{HEADER}{COSINES}\n|---|---|---:|---:|---:|---:|---:|---:|")
    for name in arguments.names:
        for row in rows(whole(name, quick=arguments.quick)):
            print(row, flush=True)


if __name__ == "__main__":
    main()
