"""tbd"""
from scaling_testbed.papers.paper import Experiment, Paper

PAPER = Paper(name="over_training", authors="Gadre et al. 2024", title="t", arxiv="2403.08540", experiments=[
    Experiment(name="overtraining"), Experiment(name="isoflop"), Experiment(name="known_entropy")])
