"""The same step in plain torch, with diffusers and peft: the loop that one would write by hand."""

from __future__ import annotations

import contextlib
import os

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, __version__
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.presets import Preset, inputs
from benchmarks.torch_model import ConcentrationProcessor, adapted_transformer, concentrating, fill
from benchmarks.worker import MATMUL, best_rate
from rcgrpo_jax.errors import UserError

# Kernels by preference. cuDNN's are the fastest forward; backward, those of torch 2.11 with cuDNN 9.19 return NaN or
# fault at FLUX's sizes on an H100, compiled or not.
FORWARD = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
BACKWARD = FORWARD[1:]


class Step:
    """The step of a preset, on the GPU if there is one.

    The LoRA's parameters have the compute dtype; the optimizer keeps float32 ones, into which gradients are summed.

    Args:
        preset: What to run.

    Raises:
        UserError: If the preset needs a GPU and there is none.
    """

    def __init__(self, preset: Preset):
        self.config, self.gpu = preset.torch_config, torch.cuda.is_available()
        if preset.alone and not self.gpu:
            raise UserError(f"{preset.name} needs a GPU; torch found none.", "Install a build of torch for CUDA.")
        self.device, self.dtype = "cuda" if self.gpu else "cpu", getattr(torch, self.config.model.dtype)
        torch.set_num_threads(len(os.sched_getaffinity(0)))  # as many as XLA takes
        self.transformer = adapted_transformer(preset, self.device, self.dtype)
        blocks = [*self.transformer.transformer_blocks, *self.transformer.single_transformer_blocks]
        self.selected = [
            ConcentrationProcessor(self.config.model.max_text_tokens) for _ in range(self.config.acd.layers)
        ]
        for block, processor in zip(blocks[-len(self.selected) :], self.selected, strict=True):
            block.attn.set_processor(processor)

        named = {name: p for name, p in self.transformer.named_parameters() if p.requires_grad}
        self.names, self.lora = [name.replace(".default", "") for name in named], list(named.values())
        self.master = [torch.zeros_like(p, dtype=torch.float32) for p in self.lora]
        for name, master in zip(self.names, self.master, strict=True):
            fill(master, name)
        self._publish()
        options = self.config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.master, options.learning_rate, (options.b1, options.b2), options.eps, options.weight_decay, fused=True
        )
        if self.config.model.remat == "full":
            self.transformer.enable_gradient_checkpointing()
        self.compile = self.gpu if preset.compile is None else preset.compile
        if self.compile:
            self.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)
        self._place(inputs(preset))

    def _place(self, given: dict[str, np.ndarray]) -> None:
        """Inputs on the device, positions, schedule, token weights of the region distance, and units."""
        given = {name: torch.from_numpy(x).to(self.device) for name, x in given.items()}
        self.text, self.pooled = (given[name].to(self.dtype) for name in ("text", "pooled"))
        self.reference, self.noise, self.states, self.region, self.advantages, self.log_old = (
            given[name] for name in ("reference", "noise", "states", "region", "advantages", "log_old")
        )
        self.guidance = torch.full((len(self.text),), self.config.model.guidance, device=self.device)

        rows, columns = (side // 16 for side in self.config.data.size)
        grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        ids = [torch.cat([torch.full((len(grid), 1), frame), grid], dim=1) for frame in (0, 1)]
        self.image_ids = torch.cat(ids).to(self.device, torch.float32)
        self.text_ids = torch.zeros(self.text.shape[1], 3, device=self.device)
        scheduler, count = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), self.config.rollout.num_steps
        shift = calculate_shift(len(grid), 256, 4096, 0.5, 1.15)
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / count, count), mu=shift, device=self.device)
        self.sigmas = scheduler.sigmas.to(self.device, torch.float32)

        options = self.config.surrogate
        inside, outside = (part / part.sum(-1, keepdim=True) for part in (self.region, 1 - self.region))
        weights = inside / options.tau_edit**2 + outside / options.tau_base**2
        self.weights = weights / self.noise.shape[-1]
        prompts = torch.arange(len(self.text), device=self.device)[:, None, None]
        units = torch.broadcast_tensors(prompts, given["anchors"][:, :, None].long(), given["steps"].long())
        self.units = [x.reshape(-1) for x in units]  # prompt, anchor and step of each

    def velocity(self, x: Tensor, sigma: Tensor, index: Tensor) -> Tensor:
        """`v_theta(x, sigma, c)` of samples `[b, N, C]` of prompts `index` `[b]`, float32."""
        v = self.transformer(
            hidden_states=torch.cat([x, self.reference[index]], dim=1).to(self.dtype),
            encoder_hidden_states=self.text[index], pooled_projections=self.pooled[index], timestep=sigma,
            img_ids=self.image_ids, txt_ids=self.text_ids, guidance=self.guidance[index], return_dict=False,
        )[0]  # fmt: skip
        return v[:, : x.shape[1]].float()

    @torch.no_grad()
    def rollout(self) -> None:
        """All candidates in micro-batches: states `[P, G, K+1, N, C]` and their ACD reward `[P, G]` (Eq. 12, 18)."""
        prompts, group = self.noise.shape[:2]
        at_a_time = self.config.rollout.micro_batch // prompts or group
        index = torch.arange(prompts, device=self.device).repeat_interleave(at_a_time)
        parts = []
        with self._attention(FORWARD), concentrating(self.selected, self.region[index]):
            for noise in self.noise.split(at_a_time, dim=1):
                states, densities = [noise.flatten(0, 1)], []
                for sigma, following in zip(self.sigmas[:-1], self.sigmas[1:], strict=True):
                    v = self.velocity(states[-1], sigma.expand(len(index)), index)
                    states.append(states[-1] + (following - sigma) * v)
                    densities += [processor.density for processor in self.selected]
                part = torch.stack(states, dim=1), torch.stack(densities).mean(0)
                parts.append([x.unflatten(0, (prompts, at_a_time)) for x in part])
        self.rolled_out, self.acd = (torch.cat(x, dim=1) for x in zip(*parts, strict=True))
        self._wait()

    def update(self) -> None:
        """One optimizer update on the given states: anchors replayed, surrogate, clipped objective (Eq. 5, 13-15)."""
        count, clip = len(self.log_old), self.config.objective.clip
        self.optimizer.zero_grad()
        losses, log_policies = [], []
        for rows in torch.arange(count, device=self.device).split(self.config.surrogate.micro_batch or count):
            index, anchor, step = (x[rows] for x in self.units)
            before, sigma = self.states[index, anchor, step - 1], self.sigmas[step - 1]
            with self._attention(BACKWARD):
                v = self.velocity(before, sigma, index)
                reached = before + (self.sigmas[step] - sigma)[:, None, None] * v
                squares = (self.states[index, :, step] - reached[:, None]).square().sum(-1)  # [u, G, N]
                log_policy = F.log_softmax(-0.5 * (self.weights[index][:, None] * squares).sum(-1), dim=-1)
                ratio, advantages = (log_policy - self.log_old[rows, 0]).exp(), self.advantages[index]
                gain = torch.minimum(advantages * ratio, advantages * ratio.clamp(1 - clip, 1 + clip))
                loss = -gain.mean() * len(rows) / count
                loss.backward()
            for master, parameter in zip(self.master, self.lora, strict=True):
                grad, parameter.grad = parameter.grad.float(), None
                master.grad = grad if master.grad is None else master.grad.add_(grad)
            losses.append(loss.detach())
            log_policies.append(log_policy.detach())
        torch.nn.utils.clip_grad_norm_(self.master, self.config.optimizer.max_grad_norm)
        self.optimizer.step()
        self._publish()
        self.loss, self.log_policy = torch.stack(losses).sum(), torch.cat(log_policies)
        self._wait()

    def _publish(self) -> None:
        torch._foreach_copy_([p.data for p in self.lora], self.master)

    def _attention(self, kernels: list[SDPBackend]) -> contextlib.AbstractContextManager:
        return sdpa_kernel(kernels, set_priority=True) if self.gpu else contextlib.nullcontext()

    def _wait(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()

    def results(self) -> dict[str, np.ndarray]:
        """What the first step computes, as the JAX step names it."""
        self.rollout()
        self.update()
        gradient = {name: p.grad.flatten() for name, p in zip(self.names, self.master, strict=True)}
        found = {
            "velocity": (self.rolled_out[:, :, 1] - self.rolled_out[:, :, 0]) / (self.sigmas[1] - self.sigmas[0]),
            "sample": self.rolled_out[:, :, -1],
            "acd": self.acd,
            "log_policy": self.log_policy,
            "loss": self.loss[None],
            "gradient": torch.cat([gradient[name] for name in sorted(gradient)]),
        }
        return {name: x.cpu().numpy() for name, x in found.items()}

    def about(self) -> dict:
        """Device and versions."""
        mode = "compiled" if self.compile else "eager"
        software = f"torch {torch.__version__} {mode}, diffusers {__version__}, {torch.get_num_threads()} threads"
        return {"platform": "gpu" if self.gpu else "cpu", "software": software}

    def peak(self) -> float:
        """FLOP/s of a large matrix product."""
        side = MATMUL["gpu" if self.gpu else "cpu"]
        x = torch.full((side, side), 0.5, device=self.device, dtype=self.dtype)

        def multiply() -> None:
            torch.matmul(x, x)
            self._wait()

        return best_rate(multiply, side)
