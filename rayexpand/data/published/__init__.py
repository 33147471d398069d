"""Datasets as they are published -> what the section `data` of a job file reads, with the published splits.

`prepare` reads an official layout and leaves a manifest and a table of class words beside the images; no image is
copied or opened. What it counts is held against what the authors or a paper published.

    found.py       what a reader of a layout finds: images and labels by official part, class words
    torchvision_layouts.py   readers through torchvision's dataset classes
    layouts.py     own readers, where torchvision has none or does not take what people have
    divisions.py   the splits of papers: official parts joined, or drawn at random
    sets.py        the table: which sets there are, their files, parts and counts
    prepare.py     folder -> checked parts -> files
"""

from rayexpand.data.published.prepare import Prepared, prepare
from rayexpand.data.published.sets import SETS, PublishedSet

__all__ = ["SETS", "Prepared", "PublishedSet", "prepare"]
