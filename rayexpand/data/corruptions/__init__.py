"""Corrupted test images, made in memory: fifteen types in five severities (Hendrycks and Dietterich, ICLR 2019).

    tables.py     names, parameters of both published tables
    config.py     the section `corrupt`
    types.py      the fifteen functions
    pieces.py     what they share: filters, zoom, plasma, affine
    corruptor.py  image, id, type, severity -> uint8 image, with keyed draws
"""
