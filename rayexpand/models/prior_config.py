"""Which generator samples: the fields of `prior` in a job file that decide what it is."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rayexpand.contract.settings import Later, Section
from rayexpand.diffusion.process import Spacing
from rayexpand.models.embedding_files import EmbeddingFile
from rayexpand.models.lora_files import LoraFile


class ProcessConfig(Section):
    """Where the noise process is another one than scheduler/scheduler_config.json says. null keeps what it says."""

    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = Field(
        None, description="what the network predicts; weights do not tell")
    spacing: Spacing | None = Field(None, description="where the steps lie, for methods that name no spacing")
    shift: float | None = Field(None, gt=0, description="shift of the grid of a flow")
    rescale_betas_zero_snr: bool | None = Field(None, description="whether the last timestep is pure noise")
    sigma_min: float | None = Field(None, gt=0, description="least noise level of an EDM grid")
    sigma_max: float | None = Field(None, gt=0, description="largest noise level of an EDM grid")
    sigma_data: float | None = Field(None, gt=0, description="standard deviation of an EDM's latents")
    kappa: Annotated[float, Field(ge=0, le=1)] | Literal["auto", "ancestral"] = Field(
        "auto", description="share of fresh noise in the noise of each first-order step: 0 none, 1 as LCM, ancestral "
        "as Euler's ancestral sampler; auto: that of the shipped scheduler")


class PriorModel(Section):
    """A generator."""

    weights: str = Field("digits", description="'digits' (embedded; the default for source digits only), 'digits-mae' "
                         "or 'digits-unclip' (embedded, for method gif), a folder of diffusers or of a masked "
                         "autoencoder, org/name@revision, or a single .safetensors file with config beside it")
    config: Annotated[str | None, Later(None)] = Field(
        None, description="of a single file: folder with the json and tokenizer files of the model that it was made "
        "from, and with the parts that the file lacks")
    parts: Annotated[dict[Literal["unet"], str], Later({})] = Field(
        {}, description="a UNet in place of that of weights: a .safetensors file, or a folder with its config.json")
    vae: Annotated[str | None, Later(None)] = Field(
        None, description="an autoencoder in place of that of weights: a .safetensors file, or a folder with its "
        "config.json")
    loras: Annotated[tuple[LoraFile, ...], Later(())] = Field(
        (), description="LoRAs that are added to the weights, in this order")
    embeddings: Annotated[tuple[EmbeddingFile, ...], Later(())] = Field(
        (), description="textual inversion words that prompts may name")
    process: Annotated[ProcessConfig, Later(ProcessConfig())] = Field(
        ProcessConfig(), description="overrides of the noise process")
    guidance: Annotated[Literal["auto", "cfg", "embedded", "none"], Later("auto")] = Field(
        "auto", description="cfg: classifier-free guidance, two calls of the network; embedded: the scale is an input "
        "of the network, as LCM; none: a distilled network without guidance, as Turbo and Lightning. auto: embedded "
        "where the network has that input, else cfg")
    vae_dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16"], Later("auto")] = Field(
        "auto", description="precision in which latents are decoded; images are always encoded in float32. auto: "
        "float32 on CPU, bfloat16 on GPU")
