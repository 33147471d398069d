"""The colours of every page and figure. Any two of s0 to s8 and grey are at least 15 apart (CIEDE2000) with and without
a colour vision deficiency, and at least 3:1 from the card, in both modes; tests/reports/test_templates.py measures
that. Figures use s0 to s5, and grey for real images only."""

from __future__ import annotations

LIGHT = {
    "page": "#f6f7f9", "card": "#ffffff", "ink": "#1b2330", "soft": "#5c6675", "line": "#e1e5eb", "track": "#e9edf2",
    "accent": "#2d5fa8", "warn": "#fff5df", "s0": "#2666c8", "s1": "#d17e00", "s2": "#005010", "s3": "#c30141",
    "s4": "#481b88", "s5": "#059cdf", "grey": "#656a74", "s6": "#221200", "s7": "#839b75", "s8": "#a48e9e"}
DARK = {
    "page": "#11151b", "card": "#1a2029", "ink": "#e4e9f0", "soft": "#98a4b5", "line": "#2b3440", "track": "#2a323d",
    "accent": "#7aa8e8", "warn": "#3a2f16", "s0": "#749bff", "s1": "#e59b18", "s2": "#1edb99", "s3": "#d5397a",
    "s4": "#795cd1", "s5": "#bfd1ff", "grey": "#939ba8", "s6": "#9f793c", "s7": "#e1ff70", "s8": "#ffe8ec"}
