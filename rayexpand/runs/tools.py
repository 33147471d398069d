"""The models and artifacts a method needs, loaded; and what stack they run on."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Sequence
from typing import Any

from rayexpand import __version__
from rayexpand.contract.protocols import Tools
from rayexpand.contract.schema import ClassTable
from rayexpand.models.guide_files import CLASS_PROMPT
from rayexpand.models.prior import load_prior, prior_hash
from rayexpand.runs.config import GuideConfig, RunConfig
from rayexpand.runs.inputs import artifact_folder, load_artifacts


def load_tools(config: RunConfig, classes: ClassTable, *, prior: Any = None, guide: Any = None,
               judge: Any = None) -> Tools:
    """Loads what method and judge ask for, but for models that are loaded already. Raises ModelError."""
    needs = config.needs
    if needs:
        import torch

        torch.set_num_threads(config.runtime.torch_threads)
    if "prior" in needs and prior is None:
        how = ("dtype", "device", "attention", "channels_last", "compile")
        prior = load_prior(config.prior, **{name: getattr(config.prior, name) for name in how})
        if "adapter" in needs:
            prior = prior.with_adapter(
                artifact_folder(config, "adapter"), scale=getattr(config.method, "lora_scale", 1.0),
                fuse=config.prior.adapter == "fused", base_sha256=prior_hash(config.prior))
    prompt = getattr(config.method, "guide_text", CLASS_PROMPT)
    if "guide" in needs and guide is None:
        guide = _guide(config.guide, config, classes, classes.key, prompt)
    if config.accept is not None and judge is None:
        own = classes.key if config.accept.wanted is None else None
        shared = own is not None and guide is not None and (config.accept.guide, CLASS_PROMPT) == (config.guide, prompt)
        judge = guide if shared else _guide(config.accept.guide, config, classes, own)
    return Tools(classes, prior if "prior" in needs else None, guide if "guide" in needs else None,
                 judge=judge if "judge" in needs else None, **load_artifacts(config, classes.key))


def _guide(said: GuideConfig, config: RunConfig, classes: ClassTable, class_keys: Sequence[str] | None,
           prompt: str = CLASS_PROMPT) -> Any:
    from rayexpand.models.guides import load_guide

    return load_guide(said.weights, said.checkpoint, classes.asked, device=config.prior.device, class_keys=class_keys,
                      prompt=prompt)


def stack_fingerprint(config: RunConfig) -> dict[str, str]:
    """Versions, instruction set or GPU model, dtype, attention and threads: what the promise calls one stack."""
    import torch

    packages = ["torch", "torchvision", "diffusers", "transformers", "open_clip_torch", "numpy", "pillow"]
    if config.needs & {"guide", "judge"}:
        packages.append("timm")
    if "adapter" in config.needs:
        packages.append("peft")
    facts = {name: importlib.metadata.version(name) for name in packages}
    facts |= {"python": platform.python_version(), "machine": platform.machine(),
              "rayexpand": __version__, "cpu": torch.backends.cpu.get_cpu_capability(),
              "torch_threads": str(config.runtime.torch_threads)}
    on_gpu = config.prior.device.startswith("cuda") or (config.prior.device == "auto" and torch.cuda.is_available())
    if "judge" in config.needs:
        facts["device"] = torch.cuda.get_device_name() if on_gpu else "cpu"
    if "prior" in config.needs:
        from rayexpand.models.latent import can_compile

        compiled = on_gpu and can_compile() if config.prior.compile == "auto" else config.prior.compile
        half = "bfloat16" if on_gpu else "float32"
        facts |= {"device": torch.cuda.get_device_name() if on_gpu else "cpu",
                  "dtype": {"auto": half}.get(config.prior.dtype, config.prior.dtype),
                  "attention": config.prior.attention,
                  "compile": str(compiled),
                  "channels_last": str(on_gpu if config.prior.channels_last == "auto" else config.prior.channels_last)}
        if (decoded := {"auto": half}.get(config.prior.vae_dtype, config.prior.vae_dtype)) != "float32":
            facts["vae_dtype"] = decoded
    return facts
