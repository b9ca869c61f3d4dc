"""KARMMA: egocentric action recognition that stays accurate when sensors are missing.

Clips become tokens once (``extract``), tokens become models many times (``train``),
models become tables and pictures (``evaluate``). Paper: arXiv 2504.08578.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("karmma-pipeline")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"
