"""License identifiers that a dataset card may state."""

from __future__ import annotations

from difflib import get_close_matches

from rayexpand.contract.errors import UsageError

# What the Hugging Face Hub accepts in a card: SPDX identifiers in lower case, and licenses of models that SPDX lacks.
KNOWN = frozenset({
    "afl-3.0", "agpl-3.0", "apache-2.0", "artistic-2.0", "bigcode-openrail-m", "bigscience-bloom-rail-1.0",
    "bigscience-openrail-m", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "bsl-1.0", "c-uda", "cc",
    "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0",
    "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0",
    "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0", "cdla-sharing-1.0",
    "creativeml-openrail-m", "deepfloyd-if-license", "ecl-2.0", "epl-1.0", "epl-2.0", "etalab-2.0", "eupl-1.1",
    "gemma", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "isc", "lgpl", "lgpl-2.1", "lgpl-3.0", "lgpl-lr", "llama2",
    "lppl-1.3c", "mit", "mpl-2.0", "ms-pl", "ncsa", "odbl", "odc-by", "ofl-1.1", "openrail", "openrail++",
    "osl-3.0", "other", "pddl", "postgresql", "unknown", "unlicense", "wtfpl", "zlib"})
# SPDX identifiers that the Hub spells otherwise.
_SPDX = {"odbl-1.0": "odbl", "odc-by-1.0": "odc-by", "pddl-1.0": "pddl", "c-uda-1.0": "c-uda", "lgpllr": "lgpl-lr",
         **{f"{name}-{suffix}": name for name in ("agpl-3.0", "gpl-2.0", "gpl-3.0", "lgpl-2.1", "lgpl-3.0")
            for suffix in ("only", "or-later")}}


def license_identifier(text: str) -> str:
    """The identifier as the Hub spells it. Raises UsageError for one that it does not know."""
    name = text.strip().lower()
    if (found := _SPDX.get(name, name)) in KNOWN:
        return found
    near = get_close_matches(name.replace(" ", "-"), sorted(KNOWN | _SPDX.keys()), n=3, cutoff=0.65)
    raise UsageError(f"--license {text}: no license identifier that the Hugging Face Hub knows; "
                     + (f"did you mean {', '.join(near)}?" if near else "give an SPDX identifier such as cc-by-4.0 or "
                        "apache-2.0.")
                     + " For a license that is not on its list give `other`, and add the text as a file LICENSE.")
