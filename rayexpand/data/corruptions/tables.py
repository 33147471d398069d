"""Names and parameters of the fifteen corruptions, severity 1 to 5, as published for images of 224 pixels (`imagenet`)
and of 32 pixels (`cifar`). Lengths are in pixels and are not scaled with the image.

Origin: Hendrycks and Dietterich, "Benchmarking neural network robustness to common corruptions and perturbations", ICLR
2019, and the code released with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

GROUPS = {"noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
          "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
          "weather": ("snow", "frost", "fog", "brightness"),
          "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression")}
COMMON = tuple(name for names in GROUPS.values() for name in names)
EXTRA = ("speckle_noise", "gaussian_blur", "spatter", "saturate")  # published beside the fifteen; no table here
FROST = "frost"
SEVERITIES = (1, 2, 3, 4, 5)

TABLES: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "imagenet": {
        "gaussian_noise": (.08, .12, .18, .26, .38),  # standard deviation, of values in 0..1
        "shot_noise": (60, 25, 12, 5, 3),  # photons of white
        "impulse_noise": (.03, .06, .09, .17, .27),  # share of the values
        "defocus_blur": ((3, .1), (4, .5), (6, .5), (8, .5), (10, .5)),  # radius, sd of its edge
        "glass_blur": ((.7, 1, 2), (.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),  # sd, reach, passes
        "motion_blur": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),  # radius, sd
        "zoom_blur": ((1.11, .01), (1.16, .01), (1.21, .02), (1.26, .02), (1.31, .03)),  # stop and step of numpy.arange
        "snow": ((.1, .3, 3, .5, 10, 4, .8), (.2, .3, 2, .5, 12, 4, .7), (.55, .3, 4, .9, 12, 8, .7),
                 (.55, .3, 4.5, .85, 12, 8, .65), (.55, .3, 2.5, .85, 12, 12, .55)),  # see types.snow
        "frost": ((1, .4), (.8, .6), (.7, .7), (.65, .7), (.6, .75)),  # weights of image and frost
        "fog": ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),  # amount, decay
        "brightness": (.1, .2, .3, .4, .5),  # added to the HSV value
        "contrast": (.4, .3, .2, .1, .05),  # factor about the mean of each channel
        "elastic_transform": ((244 * 2, 244 * .7, 244 * .1), (244 * 2, 244 * .08, 244 * .2),
                              (244 * .05, 244 * .01, 244 * .02), (244 * .07, 244 * .01, 244 * .02),
                              (244 * .12, 244 * .01, 244 * .02)),  # alpha, sd, shift of the three points
        "pixelate": (.6, .5, .4, .3, .25),  # share of the side
        "jpeg_compression": (25, 18, 15, 10, 7)},  # quality
    "cifar": {
        "gaussian_noise": (.04, .06, .08, .09, .10),
        "shot_noise": (500, 250, 100, 75, 50),
        "impulse_noise": (.01, .02, .03, .05, .07),
        "defocus_blur": ((.3, .4), (.4, .5), (.5, .6), (1, .2), (1.5, .1)),
        "glass_blur": ((.05, 1, 1), (.25, 1, 1), (.4, 1, 1), (.25, 1, 2), (.4, 1, 2)),
        "motion_blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        "zoom_blur": ((1.06, .01), (1.11, .01), (1.16, .01), (1.21, .01), (1.26, .01)),
        "snow": ((.1, .2, 1, .6, 8, 3, .95), (.1, .2, 1, .5, 10, 4, .9), (.15, .3, 1.75, .55, 10, 4, .9),
                 (.25, .3, 2.25, .6, 12, 6, .85), (.3, .3, 1.25, .65, 14, 12, .8)),
        "frost": ((1, .2), (1, .3), (.9, .4), (.85, .4), (.75, .45)),
        "fog": ((.2, 3), (.5, 3), (.75, 2.5), (1, 2), (1.5, 1.75)),
        "brightness": (.05, .1, .15, .2, .3),
        "contrast": (.75, .5, .4, .3, .15),
        "elastic_transform": ((0, 0, 32 * .08), (32 * .05, 32 * .2, 32 * .07), (32 * .08, 32 * .06, 32 * .06),
                              (32 * .1, 32 * .04, 32 * .05), (32 * .1, 32 * .03, 32 * .03)),
        "pixelate": (.95, .9, .85, .75, .65),
        "jpeg_compression": (80, 65, 58, 50, 40)}}
