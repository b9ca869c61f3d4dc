"""Digits in motion: a generated, labelled audio-visual action data set.

A handwritten digit (`noun`) moves in one of eight directions (`verb`) over a textured,
slowly drifting background while its telephone tone sounds in noise. Direction is seen by
flow and hardly by single frames; the digit is seen by RGB and heard; nothing is perfect.
Some videos have no audio track, in some the track is silent, sizes and frame rates differ
and one file has a variable frame rate: what real data do to a pipeline, in small.
"""

from karmma_pipeline.data.sample.dataset import write_sample

__all__ = ["write_sample"]
