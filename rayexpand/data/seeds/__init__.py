"""Seeds in: every dataset layout becomes one index and a reader.

`build_index` lists a dataset once, in a fixed order, without opening an image; `SeedReader` brings the encoded bytes
of chosen rows. A fault of one image is a RowFault with its reason, a fault of the dataset a SeedDataError, a fault of
the place it lies in an EnvironmentFault (try again later).

    source.py     the configuration section `data`
    places.py     files and folders, local or behind fsspec, and what their errors mean
    listing.py    what every layout's listing looks like; labels and unique ids
    layouts.py    which module reads which source; all have the same five functions
    digits.py folder.py parquet.py tars.py manifest.py npz.py cifar.py cifar_c.py
    pickles.py    pickles as data, for cifar.py
    index.py      mistakes, selection, the index
    reader.py     index rows -> encoded images
    texts.py      a column of texts beside the images
"""

from rayexpand.data.seeds.digits import digits_split
from rayexpand.data.seeds.index import build_index, check, renamed, survey, survey_lines, surveyed
from rayexpand.data.seeds.listing import EXTENSIONS
from rayexpand.data.seeds.reader import SeedReader
from rayexpand.data.seeds.source import DataConfig, image_id
from rayexpand.data.seeds.texts import text_problem, texts

__all__ = ["EXTENSIONS", "DataConfig", "SeedReader", "build_index", "check", "digits_split", "image_id", "renamed",
           "survey", "survey_lines", "surveyed", "text_problem", "texts"]
