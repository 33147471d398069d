"""Whether LoRAs and words that people bring fit a generator, before anything is loaded."""

from __future__ import annotations

from rayexpand.models.conversion import skeleton
from rayexpand.models.embedding_files import embedding_problems
from rayexpand.models.lora_files import lora_problems
from rayexpand.models.prior import prior_tokenizer
from rayexpand.models.prior_config import PriorModel
from rayexpand.models.sources import PriorSources


def added_problems(sources: PriorSources, model: PriorModel) -> list[str]:
    """What keeps LoRAs and embeddings from being added to a generator, one line each. Raises ModelError."""
    if not model.loras and not model.embeddings:
        return []
    networks = {part: skeleton(sources.part(part).config, kind) for part, kind in sources.classes().items()
                if part != "vae"}
    problems = lora_problems(model.loras, {part: {name: tuple(one.shape) for name, one in network.named_parameters()}
                                           for part, network in networks.items()})
    if model.embeddings:
        widths = {part: network.get_input_embeddings().weight.shape[1] for part, network in networks.items()
                  if part.startswith("text_encoder")}
        words = {word for part in widths
                 for word in prior_tokenizer(sources.folder, part.replace("text_encoder", "tokenizer")).get_vocab()}
        problems += embedding_problems(model.embeddings, widths, words)
    return problems
