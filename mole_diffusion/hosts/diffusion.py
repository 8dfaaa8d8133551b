"""Diffusers pipelines (and their bare UNet or transformer): where blocks are, what their modules read, how they run."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from mole_diffusion.errors import InvalidRequest
from mole_diffusion.experts.canonical import Expert
from mole_diffusion.functional import trigger_spans
from mole_diffusion.gates.protocol import BlockSpec, Sees
from mole_diffusion.hosts.protocol import Listener, Step
from mole_diffusion.hosts.tokens import ENCODERS, lend_tokens
from mole_diffusion.prompts import listen, prompt_spans, trigger_ids

_LAYERS = ("attn", "attn1", "attn2", "ff", "ff_context")
_READS_TEXT = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


class DiffusionHost:
    """A pipeline with ``unet`` or ``transformer``; see :class:`mole_diffusion.hosts.Host`."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.main = "unet" if getattr(pipe, "unet", None) is not None else "transformer"
        self.model: nn.Module = getattr(pipe, self.main)
        width = _config(self.model, "cross_attention_dim") or _config(self.model, "joint_attention_dim") or 0
        self.network_width = int(width[0] if isinstance(width, list | tuple) else width)
        if _config(self.model, "caption_channels"):  # PixArt projects its captions inside
            self.network_width = int(_config(self.model, "caption_channels"))

    def models(self) -> Mapping[str, nn.Module]:
        """The denoiser, then the text encoders."""
        found = {self.main: self.model}
        for name in ENCODERS:
            encoder = getattr(self.pipe, name, None)
            if isinstance(encoder, nn.Module):
                found[name] = encoder
        return found

    def check(self) -> None:
        """See :meth:`Host.check`."""
        for path, module in self.model.named_modules():
            if _is_fused(module):
                raise InvalidRequest(
                    f"The query, key and value projections of {path} are fused, so that experts on them would be "
                    f"passed by: call pipe.{self.main}.unfuse_qkv_projections() first."
                )
        for name, model in self.models().items():
            if any(parameter.is_meta for parameter in model.parameters()):
                raise InvalidRequest(
                    f"The weights of {name} are not in memory (sequential CPU offload): experts cannot be placed "
                    "beside them. Use pipe.enable_model_cpu_offload() instead."
                )

    def blocks(self) -> Sequence[BlockSpec]:
        """BasicTransformerBlocks and ResnetBlock2Ds of a UNet; the members of a transformer's block lists."""
        return list(_unet_blocks(self.model) if self.main == "unet" else _transformer_blocks(self.model))

    def layer(self, block: BlockSpec, leaf: str) -> str:
        """attn1, attn2, ff, …; a ResNet is one layer."""
        head = leaf.split(".", 1)[0]
        return head if head in _LAYERS else ""

    def sees(self, block: BlockSpec, leaf: str) -> Sees:
        """Image tokens or grid cells, text tokens, or one vector per row."""
        head, tail = leaf.split(".", 1)[0], leaf.rsplit(".", 1)[-1]
        if head == "time_emb_proj" or (head.startswith("norm") and tail == "linear"):
            return "row"
        if tail in _READS_TEXT or head == "ff_context":
            return "text"
        cross = self.model.get_submodule(block.name).__class__.__name__ == "BasicTransformerBlock"
        return "text" if cross and block.text_width and leaf in ("attn2.to_k", "attn2.to_v") else "image"

    def spans(self, prompts: Sequence[str], experts: Sequence[Expert]) -> Tensor:
        """See :func:`mole_diffusion.prompts.prompt_spans`."""
        return prompt_spans(self.pipe, prompts, experts)

    def lend(self, experts: Sequence[Expert]) -> Callable[[], None]:
        """See :func:`mole_diffusion.hosts.tokens.lend_tokens`."""
        return lend_tokens(self.pipe, experts)

    def watch(self, listener: Listener, experts: Sequence[Expert]) -> Callable[[], None]:
        """Forward hooks on every model, and a wrapper on the pipeline's ``encode_prompt``."""
        with ExitStack() as stack:
            for name, tokenizer in ENCODERS.items():
                encoder = getattr(self.pipe, name, None)
                if isinstance(encoder, nn.Module):
                    hook = _encoder_hook(listener, name, self.pipe, getattr(self.pipe, tokenizer, None), experts)
                    stack.callback(encoder.register_forward_pre_hook(hook, with_kwargs=True).remove)
            begin = _step_hook(listener, self.model)
            stack.callback(self.model.register_forward_pre_hook(begin, with_kwargs=True).remove)
            stack.callback(self.model.register_forward_hook(lambda *_: listener.end()).remove)
            stack.callback(listen(self.pipe, listener.hear))
            return stack.pop_all().close
        raise AssertionError("unreachable")


def _config(model: nn.Module, name: str) -> Any:
    return getattr(getattr(model, "config", None), name, None)


def _is_fused(module: nn.Module) -> bool:
    """Does attention pass its separate projections by? A processor of diffusers' first kind of attention tells."""
    from diffusers.models.attention_processor import Attention

    if isinstance(module, Attention):
        return type(module.processor).__name__.startswith("Fused")
    return bool(getattr(module, "fused_projections", False))


def _unet_blocks(unet: nn.Module) -> Iterator[BlockSpec]:
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.resnet import ResnetBlock2D

    strides = _strides(unet)
    for path, module in unet.named_modules():
        stride = strides.get(".".join(path.split(".", 2)[:2]), strides["mid_block"])
        if isinstance(module, BasicTransformerBlock):
            yield BlockSpec(path, "transformer", _in_features(module.attn1), _text_width(module), stride=stride)
        elif isinstance(module, ResnetBlock2D):
            yield BlockSpec(path, "resnet", module.in_channels, out_width=module.out_channels, stride=stride)


def _strides(unet: Any) -> dict[str, int]:
    """ "down_blocks.0", "mid_block", "up_blocks.0" … → side of the square of latents behind one of its cells."""
    strides, stride = {}, 1
    for index, block in enumerate(unet.down_blocks):
        strides[f"down_blocks.{index}"] = stride
        stride *= 2 if getattr(block, "downsamplers", None) else 1
    strides["mid_block"] = stride
    for index, block in enumerate(unet.up_blocks):
        strides[f"up_blocks.{index}"] = stride
        stride //= 2 if getattr(block, "upsamplers", None) else 1
    return strides


def _transformer_blocks(transformer: nn.Module) -> Iterator[BlockSpec]:
    stride = _config(transformer, "patch_size")
    stride = stride if isinstance(stride, int) else 0
    for name, child in transformer.named_children():
        if isinstance(child, nn.ModuleList) and name.endswith(("blocks", "layers")):
            for index, block in enumerate(child):
                first = getattr(block, "attn1", None) or getattr(block, "attn", None)
                if first is not None:
                    width = _in_features(first)
                    yield BlockSpec(f"{name}.{index}", "transformer", width, _text_width(block), stride=stride)


def _in_features(attention: Any) -> int:
    return attention.to_q.in_features


def _text_width(block: Any) -> int:
    """Channels of the text that a block reads, 0 where it reads none."""
    joint = getattr(getattr(block, "attn", None), "add_k_proj", None)
    cross = getattr(getattr(block, "attn2", None), "to_k", None)
    reads = joint if joint is not None else cross if block.__class__.__name__ == "BasicTransformerBlock" else None
    return 0 if reads is None else reads.in_features


def _encoder_hook(
    listener: Listener, name: str, pipe: Any, tokenizer: Any, experts: Sequence[Expert]
) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs["input_ids"]
        spans = None if tokenizer is None else trigger_spans(ids, trigger_ids(tokenizer, experts, pipe))
        listener.encode(name, spans, ids.device)

    return hook


def _step_hook(listener: Listener, model: nn.Module) -> Callable[..., None]:
    names = list(inspect.signature(model.forward).parameters)
    sample = "sample" if "sample" in names else "hidden_states"
    horizon = 1 if type(model).__name__.startswith("Flux") else 1000  # Flux is told the share of noise

    def given(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name not in names:
            return None
        index = names.index(name)
        return args[index] if index < len(args) else kwargs.get(name)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x, times, text = (given(name, args, kwargs) for name in (sample, "timestep", "encoder_hidden_states"))
        rows = x.shape[0]
        if times is not None:
            times = torch.as_tensor(times, device=x.device).reshape(-1).expand(rows)
        latent = (x.shape[-2], x.shape[-1]) if x.ndim == 4 else (1, 1)  # packed latents do not say how they lie
        listener.begin(Step(rows, x.device, times, horizon, text, latent))

    return hook
